"""The engine against a slow one that recomputes everything for one sequence at a time."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vkernels
from vtrain.batch import Document, PackedBatch
from vtrain.dist.fsdp import shard
from vtrain.dist.mesh import world
from vtrain.generate import engine, graph
from vtrain.generate.engine import Samples, generate
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
    penalty, sampling = sampling.repetition_penalty, replace(sampling, repetition_penalty=1.0)
    new = []
    for step in range(steps):
        cond = next_logits([*prompt, *new])
        for column in {i - base for i in (*prompt, *new)} & set(range(cond.shape[1])):
            cond[0, column] *= penalty if cond[0, column] < 0 else 1 / penalty
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
        ({"repetition_penalty": 3.0, "seed": 4}, "visual"),
        ({"repetition_penalty": 1.7, "cfg": 2.5, "top_k": 8}, None),
    ],
    ids=str,
)
def test_equal_to_the_slow_engine(decoder, settings, vocab_range):
    """Prompts of mixed lengths, one of them twice, in batches that cut through them: each equals its single run."""
    steps = 6
    options = {"uncond_prompts": UNCOND, "vocab_range": vocab_range, **settings}
    found = generate(decoder, PROMPTS, KEYS, steps=steps, batch_size=4, **options)
    assert torch.equal(generate(decoder, PROMPTS, KEYS, steps=steps, batch_size=2, **options), found)
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


@pytest.mark.parametrize("vocab_range", ["visual", None])
@torch.no_grad()
def test_log_probabilities_are_those_of_a_teacher_forced_forward(decoder, vocab_range):
    """What a rollout logs is what a trainer computes of the same tokens, in one forward over all of them."""
    found, logprobs = generate(
        decoder, PROMPTS, KEYS, steps=7, vocab_range=vocab_range, batch_size=4, return_logprobs=True
    )
    assert logprobs.shape == (6, 7)
    assert torch.equal(found, generate(decoder, PROMPTS, KEYS, steps=7, vocab_range=vocab_range, batch_size=4))
    batch = PackedBatch.build([Document(np.array([*p, *new])) for p, new in zip(PROMPTS, found.tolist())], VOCAB)
    hidden, _ = decoder(batch)
    ends = torch.tensor([len(p) for p in PROMPTS]) + 7 * torch.arange(6) + np.cumsum([0, *map(len, PROMPTS)])[:-1]
    rows = hidden[ends[:, None] - 1 + torch.arange(7)].flatten(0, 1)
    tables, bases, sizes = decoder.head()
    only = {}
    if vocab_range is not None:
        only["row_class"] = torch.full((42,), VOCAB.names.index(vocab_range), dtype=torch.int32)
    logged = vkernels.linear_logprob(rows, tables, bases, found.flatten(), sizes=sizes, **only)
    torch.testing.assert_close(logged.view(6, 7), logprobs, atol=1e-4, rtol=0)
    base = 0 if vocab_range is None else VOCAB[vocab_range].base
    logits = decoder.logits(rows, None if vocab_range is None else (vocab_range,)).double()
    slow = logits.log_softmax(-1).gather(1, found.flatten()[:, None] - base)
    torch.testing.assert_close(slow.view(6, 7), logprobs.double(), atol=1e-5, rtol=0)


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


class DeviceOnly(TorchDispatchMode):
    """Refuses what a meta tensor, standing in for one on a GPU, would have to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        places = [{t.device.type for t in tree_leaves(x) if isinstance(t, torch.Tensor)} for x in ((args, kwargs), out)]
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "item", "equal"), func
        assert places[0] in ({"meta"}, set()), f"{func} takes a tensor from {places[0]}"
        assert places[1] in ({"meta"}, set()), f"{func} makes a tensor on {places[1]}"
        return out


@torch.no_grad()
def test_a_step_touches_nothing_but_the_device():
    """No copy in either direction, so that a graph can hold it."""
    with torch.device("meta"):
        model = Decoder(SHAPE, VOCAB)
    sampling = Sampling(cfg=2.0, top_k=5, top_p=0.9, repetition_penalty=1.1)
    samples = Samples(2, model, 20, 4, sampling, "visual")
    samples.begin(PROMPTS[:2], UNCOND[:2], KEYS[:2])
    with DeviceOnly():
        samples.extend()
        with pytest.raises(AssertionError, match="makes a tensor on"):
            torch.zeros(())


class FakeCuda:
    """torch.cuda, as far as `Replay` uses it, on the CPU: a capture writes down the operators and undoes their work.

    A replay runs the same operators on the same tensors again: numbers that the host counted would stay what they were.
    """

    def __init__(self, kept: Callable[[], list[torch.Tensor]]):
        self.kept, self.events = kept, []

    def __getattr__(self, name):
        assert name in ("device", "stream", "current_stream", "Stream"), name
        return mock.MagicMock()

    def CUDAGraph(self):
        return Recording(self.events)

    @contextlib.contextmanager
    def graph(self, graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"  # loader threads lock pages meanwhile
        before = [t.clone() for t in self.kept()]
        self.events.append("capture")
        with graph:
            yield
        for t, old in zip(self.kept(), before):
            t.copy_(old)


class Recording(TorchDispatchMode):
    def __init__(self, events):
        super().__init__()
        self.calls, self.events = [], events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        self.events.append("replay")
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            if not any(r.alias_info for r in func._schema.returns):  # neither a view nor written in place
                for old, value in zip(tree_leaves(out), tree_leaves(new)):
                    old.copy_(value)


@pytest.mark.parametrize("settings", [{}, {"cfg": 2.0, "top_k": 5}, {"repetition_penalty": 2.0, "cfg": 1.5}], ids=str)
def test_replayed_steps_are_the_same_steps(decoder, monkeypatch, settings):
    """Two batches of 2 on the same tensors, then one of 1 on others: captured twice, and the same samples."""
    options = {"steps": 6, "batch_size": 2, "uncond_prompts": UNCOND[:5], "return_logprobs": True, **settings}
    expected = generate(decoder, PROMPTS[:5], KEYS[:5], **options)
    made = []
    monkeypatch.setattr(engine, "Samples", lambda *args: made.append(Samples(*args)) or made[-1])
    cuda = FakeCuda(lambda: tensors_of(made[-1]))
    monkeypatch.setattr(graph, "torch", mock.Mock(cuda=cuda))
    monkeypatch.setattr(engine, "_capturable", lambda decoder: True)
    found = generate(decoder, PROMPTS[:5], KEYS[:5], **options)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    # Of 5 steps after the prompts, a plain one and 4 replays; 5 replays of the second batch; the same for the last.
    assert cuda.events == ["capture", *["replay"] * 9, "capture", *["replay"] * 4]
    cuda.events.clear()
    generate(decoder, PROMPTS[:5], KEYS[:5], graph=False, **options)
    assert not cuda.events


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"cfg": 2.0, "top_k": 5, "top_p": 0.9}, {"repetition_penalty": 2.0}], ids=str)
def test_a_graph_gives_the_same_samples_on_a_gpu(dtype, settings):
    decoder = Decoder(replace(SHAPE, hidden=64), VOCAB).eval().to("cuda", dtype)
    options = {"steps": 12, "batch_size": 2, "uncond_prompts": UNCOND[:5], **settings}
    found = [generate(decoder, PROMPTS[:5], KEYS[:5], graph=graph, **options) for graph in (False, True)]
    assert torch.equal(*found)


def tensors_of(samples: Samples) -> list[torch.Tensor]:
    """All that a step may write to."""
    owners = (vars(samples), vars(samples._cache), samples._cache._keys, samples._cache._values, vars(samples._batch))
    return [value for owner in owners for value in owner.values() if isinstance(value, torch.Tensor)]


def test_only_whole_decoders_on_a_gpu_are_captured(decoder):
    whole, part = mock.Mock(is_cuda=True), mock.Mock(spec=DTensor, is_cuda=True)
    for parameters, expected in (([whole, whole], True), ([whole, part], False), (list(decoder.parameters()), False)):
        assert engine._capturable(mock.Mock(parameters=lambda p=parameters: p)) == expected


def test_speculation_gets_every_batch_and_refuses_what_it_cannot_do(decoder, monkeypatch):
    calls = []

    def jacobi_batch(model, prompts, keys, uncond, steps, sampling, vocab_range, progress, capture):
        assert not capture
        calls.append((prompts, keys, uncond, sampling, vocab_range))
        return torch.tensor(keys)[:, None].expand(-1, steps)

    monkeypatch.setattr(engine, "jacobi_batch", jacobi_batch)
    options = {"steps": 3, "batch_size": 2, "speculate": 4}
    out = generate(decoder, PROMPTS[:3], [1, 2, 3], cfg=2.0, uncond_prompts=UNCOND[:3], **options)
    assert out.tolist() == [[1] * 3, [2] * 3, [3] * 3]
    sampling = Sampling(cfg=2.0, speculate=4)
    assert calls == [
        (PROMPTS[:2], [1, 2], UNCOND[:2], sampling, "visual"),
        (PROMPTS[2:3], [3], UNCOND[2:3], sampling, "visual"),
    ]
    assert generate(decoder, [], [], **options).shape == (0, 3)
    for wrong, message in (
        ({"repetition_penalty": 1.1}, "repetition_penalty is 1.1; expected 1 with speculate 4"),
        ({"return_logprobs": True}, "return_logprobs with speculate"),
        ({"rounds": 2}, "speculate with a sharded decoder or further rounds"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(decoder, PROMPTS[:2], KEYS[:2], **options, **wrong)


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
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; expected above 0"),
        ({"speculate": -1}, "speculate is -1"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(decoder, change, message):
    arguments = {"prompts": PROMPTS, "keys": KEYS, "steps": 3, **change}
    with pytest.raises(ValueError, match=message):
        generate(decoder, **arguments)
