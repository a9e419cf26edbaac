"""The engine against a slow one that recomputes everything for one sequence at a time."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from vtrain.batch import Document, PackedBatch
from vtrain.dist.fsdp import shard
from vtrain.dist.mesh import world
from vtrain.generate.engine import generate
from vtrain.generate.sampler import Sampling, key_rows, sample_token
from vtrain.models.decoder import Decoder, DecoderConfig
from vtrain.objectives.next_token import NextToken
from vtrain.train.tasks.root import Root
from vtrain.vocab import Vocabulary

VOCAB = Vocabulary.of(text=37, visual=24, extra=10)
PROMPTS = [[3], [5, 9, 11, 2, 30], [7, 7, 8], [3], [1, 2, 3, 4, 5, 6, 7, 8, 9], [60, 12]]
UNCOND = [[3, 4], [3, 4], [6, 1, 2], [3, 4], [3, 4], [0]]
SHAPE = DecoderConfig(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, max_positions=64, init_std=0.3)
KEYS = [11, 22, 2**64 - 1, 44, 55, 66]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(SHAPE, VOCAB).eval()


@torch.no_grad()
def slow_generate(decoder, prompt, uncond, key, steps, sampling, vocab_range) -> list[int]:
    """One sample without cache, batch or shared prefix."""

    def next_logits(tokens):
        hidden, _ = decoder(PackedBatch.build([Document(np.array(tokens))], VOCAB))
        logits = decoder.logits(hidden[-1:])
        if vocab_range is None:
            return logits
        r = VOCAB[vocab_range]
        return logits[:, r.base : r.end]

    base = 0 if vocab_range is None else VOCAB[vocab_range].base
    new = []
    for step in range(steps):
        cond = next_logits([*prompt, *new])
        other = next_logits([*uncond, *new]) if sampling.guided else None
        token, _ = sample_token(cond, other, key_rows([key]), step, sampling)
        new.append(base + int(token))
    return new


@pytest.mark.parametrize(
    ("settings", "vocab_range"),
    [
        ({}, "visual"),
        ({"cfg": 2.5, "seed": 3}, "visual"),
        ({"cfg": 3.0, "temperature": 0.7, "top_k": 8, "top_p": 0.8, "seed": 9}, "visual"),
        ({"temperature": 0.0, "cfg": 1.5}, "visual"),
        ({"seed": 1}, None),
        ({"cfg": 2.0}, "extra"),
    ],
    ids=str,
)
def test_equal_to_the_slow_engine(decoder, settings, vocab_range):
    """Prompts of mixed lengths, one of them twice, in batches that cut through them: each equals its single run."""
    steps = 6
    found = generate(
        decoder, PROMPTS, KEYS, steps=steps, uncond_prompts=UNCOND, vocab_range=vocab_range, batch_size=4, **settings
    )
    assert found.dtype == torch.int64
    assert found.shape == (len(PROMPTS), steps)
    expected = [
        slow_generate(decoder, p, u, k, steps, Sampling(**settings), vocab_range)
        for p, u, k in zip(PROMPTS, UNCOND, KEYS)
    ]
    assert found.tolist() == expected
    if vocab_range is not None:
        r = VOCAB[vocab_range]
        assert r.base <= int(found.min())
        assert int(found.max()) < r.end


def test_a_sample_depends_on_its_key_not_on_its_place(decoder):
    def run(order, batch_size):
        out = generate(
            decoder,
            [PROMPTS[i] for i in order],
            [KEYS[i] for i in order],
            steps=5,
            cfg=1.5,
            uncond_prompts=[UNCOND[i] for i in order],
            batch_size=batch_size,
        )
        return dict(zip(order, out.tolist()))

    whole = run([0, 1, 2, 3, 4, 5], 6)
    assert run([5, 3, 1, 0, 4, 2], 2) == whole
    assert run([4], 1)[4] == whole[4]
    assert whole[0] != whole[3]  # the same prompt under another key


def test_seed_and_key_change_the_sample(decoder):
    def run(seed, key):
        return generate(decoder, [PROMPTS[1]], [key], steps=8, seed=seed).tolist()

    assert run(0, 1) == run(0, 1)
    assert run(0, 1) != run(1, 1)
    assert run(0, 1) != run(0, 2)


def test_scale_one_never_runs_the_unconditional_branch(decoder):
    plain = generate(decoder, PROMPTS, KEYS, steps=3)
    assert torch.equal(generate(decoder, PROMPTS, KEYS, steps=3, cfg=1.0, uncond_prompts=UNCOND), plain)
    rows = record_rows(decoder, cfg=1.0, uncond_prompts=UNCOND)
    # 6 prompts of which 5 are distinct: 1 + 5 + 3 + 9 + 2 tokens at once, then one token per sequence.
    assert rows == [20, 6, 6]
    rows = record_rows(decoder, cfg=2.0, uncond_prompts=UNCOND)
    assert rows == [20 + 2 + 3 + 1, 12, 12]


def record_rows(decoder, prompts=PROMPTS, steps=3, **options) -> list[int]:
    """The number of token rows of every forward."""
    rows = []
    hook = decoder.register_forward_pre_hook(lambda _, args: rows.append(len(args[0].ids)))
    try:
        generate(decoder, prompts, KEYS[: len(prompts)], steps=steps, **options)
    finally:
        hook.remove()
    return rows


def test_every_rank_makes_the_same_number_of_forwards(decoder):
    """Ranks with 5, 2 and 0 prompts that agree on 3 rounds of 4 steps: 12 forwards each, and the same samples."""
    for count in (5, 2, 0):
        rows = record_rows(decoder, PROMPTS[:count], 4, batch_size=2, rounds=3, cfg=2.0, uncond_prompts=UNCOND[:count])
        assert len(rows) == 12
    out = generate(decoder, PROMPTS[:2], KEYS[:2], steps=4, batch_size=2, rounds=3)
    assert torch.equal(out, generate(decoder, PROMPTS[:2], KEYS[:2], steps=4))
    assert generate(decoder, [], [], steps=4, rounds=1).shape == (0, 4)
    with pytest.raises(ValueError, match="5 prompts in batches of 2 take 3 rounds, not 2"):
        generate(decoder, PROMPTS[:5], KEYS[:5], steps=4, batch_size=2, rounds=2)


def generate_sharded(state: dict) -> tuple[list, list]:
    """On each rank: its share of the samples from an FSDP decoder, before and after a step of training on it."""
    with world("cpu") as here:
        model = Decoder(SHAPE, VOCAB)
        model.load_state_dict(state)
        root = Root(model, NextToken())
        shard(root, model.layers, here, torch.float32)
        batch = PackedBatch.build([Document(np.array([1, 2, 40, 41]))], VOCAB)
        mine = slice(0, 4) if here.rank == 0 else slice(4, 5)
        found = []
        for _ in range(2):
            terms, _ = root(batch)
            terms["next_token"][0].backward()
            root.unshard()  # the tables; each layer gathers itself
            out = generate(model, PROMPTS[mine], KEYS[mine], steps=3, batch_size=2, rounds=2)
            root.reshard()
            found.append(out.tolist())
        return tuple(found)


def test_a_sharded_decoder_samples_the_same_and_can_train_on(decoder):
    expected = generate(decoder, PROMPTS, KEYS, steps=3).tolist()
    for first, share in zip((0, 4), run_ranks(2, generate_sharded, decoder.state_dict())):
        assert share[0] == share[1] == expected[first : first + len(share[0])]


class HostReads(TorchDispatchMode):
    """Counts the calls that wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "item", "equal", "unique_consecutive")
        return func(*args, **(kwargs or {}))


def test_decode_steps_do_not_wait_for_the_device(decoder):
    counts = []
    for steps in (2, 9):
        with HostReads() as reads:
            generate(decoder, PROMPTS, KEYS, steps=steps, cfg=2.0, top_k=5, top_p=0.9, uncond_prompts=UNCOND)
        counts.append(reads.count)
    assert counts[0] == counts[1] >= 1  # the one check at the end of the batch


def test_progress_counts_every_new_token(decoder):
    seen = []
    generate(decoder, PROMPTS, KEYS, steps=3, batch_size=4, progress=seen.append)
    assert seen == [4, 4, 4, 2, 2, 2]


def test_works_inside_inference_mode_and_leaves_no_gradient(decoder):
    with torch.inference_mode():
        inside = generate(decoder, PROMPTS, KEYS, steps=3)
    outside = generate(decoder, PROMPTS, KEYS, steps=3)
    assert inside.tolist() == outside.tolist()
    assert not outside.requires_grad


def test_logits_that_are_not_finite_are_an_error(decoder):
    with torch.no_grad():
        kept = decoder.norm.clone()
        decoder.norm.fill_(float("nan"))
    try:
        with pytest.raises(FloatingPointError, match="not finite"):
            generate(decoder, PROMPTS, KEYS, steps=2)
    finally:
        with torch.no_grad():
            decoder.norm.copy_(kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []], "keys": [1, 2]}, "prompt 1 has 0 ids; expected 1 to 61"),
        ({"prompts": [[1] * 62], "keys": [1]}, r"prompt 0 has 62 ids; expected 1 to 61 \(64 positions less 3 steps\)"),
        ({"prompts": [[71]], "keys": [1]}, r"prompt 0 has an id outside 0\.\.70"),
        ({"cfg": 2.0}, r"cfg 2.0 needs one unconditional prompt per prompt \(6\), got none"),
        ({"cfg": 2.0, "uncond_prompts": [[1]]}, r"per prompt \(6\), got 1"),
        ({"keys": [1]}, "1 keys for 6 prompts"),
        ({"vocab_range": "vision"}, "no vocabulary range 'vision'; expected one of"),
        ({"steps": 0}, "steps is 0"),
        ({"top_p": 2.0}, "top_p is 2.0"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(decoder, change, message):
    arguments = {"prompts": PROMPTS, "keys": KEYS, "steps": 3, **change}
    with pytest.raises(ValueError, match=message):
        generate(decoder, **arguments)
