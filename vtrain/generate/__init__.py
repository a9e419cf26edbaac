"""Generation: KV cache, sampler, engine, and the helpers that turn generated codes into pictures."""
