"""Speculative Jacobi decoding against exact enumeration of the decoder's distribution, and against plain decoding."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vtrain.generate.speculative as speculative
from vtrain.batch import Document, PackedBatch
from vtrain.generate.engine import generate
from vtrain.generate.sampler import Sampling, key_rows, sample_token
from vtrain.generate.speculative import Drafts, Windows, couple, distribution, jacobi_batch
from vtrain.generate.window_cache import WindowCache
from vtrain.models.decoder import Decoder, DecoderConfig
from vtrain.vocab import Vocabulary

TEXT, CODES = 9, 6
VOCAB = Vocabulary.of(text=TEXT, visual=CODES)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 2, 1, 8], [3, 3]]
UNCOND = [[2], [6, 6, 1], [7], [2]]
KEYS = [5, 2**64 - 3, 9, 10]


def make_decoder(**changes) -> Decoder:
    """Random weights, large enough that a distribution depends much on every token before it."""
    shape = {"layers": 2, "hidden": 16, "heads": 4, "kv_heads": 2, "ffn": 24, "max_positions": 64, "init_std": 0.5}
    return Decoder(DecoderConfig(**{**shape, **changes}), VOCAB).eval()


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder()


def run(decoder, prompts, keys, steps, window, uncond=None, vocab_range="visual", progress=None, **options):
    """(tokens, number of forwards)."""
    forwards = []
    hook = decoder.register_forward_pre_hook(lambda *_: forwards.append(1))
    sampling = Sampling(speculate=window, **options)
    try:
        out = jacobi_batch(decoder, prompts, keys, uncond, steps, sampling, vocab_range, progress)
    finally:
        hook.remove()
    return out, len(forwards)


@torch.no_grad()
def exact_joint(decoder, prompt, steps, uncond=None, cfg=1.0, temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    """The probability of every continuation, [CODES] * steps, in float64 and without any cache."""
    decoder = make_decoder().double()

    def logits(prompt, tokens):
        batch = PackedBatch.build([Document(np.array([*prompt, *(TEXT + t for t in tokens)]))], VOCAB)
        return decoder.logits(decoder(batch)[0][-1:], ("visual",))[0].log_softmax(-1).numpy()

    def conditional(tokens):
        x = logits(prompt, tokens)
        if uncond is not None:
            u = logits(uncond, tokens)
            x = u + cfg * (x - u)
        x = x / temperature
        x[x < np.sort(x)[-top_k]] = -math.inf
        p = np.exp(x - x.max())
        p /= p.sum()
        above = np.array([p[p > own].sum() for own in p])
        p[above >= top_p] = 0
        return p / p.sum()

    joint = np.ones([CODES] * steps)
    for length in range(steps):
        for tokens in itertools.product(range(CODES), repeat=length):
            joint[tokens] *= conditional(tokens).reshape(-1, *[1] * (steps - length - 1))
    return joint


def chi_square(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """(chi-square, its 99.99 % point by Wilson and Hilferty), outcomes expected less than 5 times taken together."""
    rare = expected < 5
    found = np.append(found[~rare], found[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    if expected[-1] < 5:  # too few for a cell of their own
        found, expected = (np.append(x[:-2], x[-2:].sum()) for x in (found, expected))
    n = len(expected) - 1
    return float(((found - expected) ** 2 / expected).sum()), n * (1 - 2 / (9 * n) + 3.72 * math.sqrt(2 / (9 * n))) ** 3


SETTINGS = {
    "plain": {},
    "cut": {"temperature": 0.7, "top_k": 4, "top_p": 0.9},
    "guided": {"cfg": 1.7},
    "guided and cut": {"cfg": 2.0, "temperature": 1.4, "top_k": 5, "top_p": 0.95},
}


def compare(decoder, window, steps, draws=24_000, **options) -> tuple[float, float]:
    """chi-square of the continuations of two prompts, of which every batch row is one draw."""
    guided = "cfg" in options
    prompts, uncond = (PROMPTS[0], PROMPTS[2]), (UNCOND[0], UNCOND[1])
    rows = [list(side) * (draws // 2) for side in (prompts, uncond)]
    out, _ = run(decoder, rows[0], range(draws), steps, window, rows[1] if guided else None, seed=7, **options)
    found, expected = [], []
    for first in (0, 1):
        joint = exact_joint(decoder, prompts[first], steps, uncond[first] if guided else None, **options)
        code = np.ravel_multi_index(tuple((out[first::2] - TEXT).T.numpy()), joint.shape)
        found.append(np.bincount(code, minlength=joint.size))
        expected.append(joint.ravel() * (draws // 2))
        assert (found[-1][expected[-1] == 0] == 0).all()  # what top-k and top-p leave out never comes
    return chi_square(np.concatenate(found), np.concatenate(expected))


@pytest.mark.parametrize(("setting", "window"), [("plain", 2), ("cut", 1), ("guided", 1), ("guided and cut", 2)])
def test_continuations_follow_the_exact_joint_distribution(decoder, setting, window):
    chi2, limit = compare(decoder, window, 3, **SETTINGS[setting])
    assert chi2 < limit


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 3, 96])
@pytest.mark.parametrize("setting", SETTINGS)
def test_longer_continuations_follow_the_exact_joint_distribution(decoder, setting, window):
    chi2, limit = compare(decoder, window, 4, **SETTINGS[setting])
    assert chi2 < limit


def keep_all(x, q, p, words):
    return torch.where(q.sum(-1) > 0, x, couple(x, torch.zeros_like(q), p, words)[0]), q.sum(-1) > 0


def redraw_from_p(x, q, p, words):
    stays = couple(x, q, p, words)[1]
    return torch.where(stays, x, couple(x, torch.zeros_like(q), p, words)[0]), stays


def one_number_for_both(x, q, p, words):
    return couple(x, q, p, (words[0], words[1]) * 2)


def wrong_draft_distribution(x, q, p, words):
    return couple(x, q.roll(1, dims=-1), p, words)


FAULTS = [keep_all, redraw_from_p, one_number_for_both, wrong_draft_distribution]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_the_chi_square_sees_a_wrong_rule(decoder, fault, monkeypatch):
    monkeypatch.setattr(speculative, "couple", fault)
    chi2, limit = compare(decoder, 2, 3, draws=8000)
    assert chi2 > 2 * limit


def test_the_chi_square_sees_the_keys_of_a_rejected_draft(decoder, monkeypatch):
    begin_window = WindowCache.begin_window

    def keeping_the_draft(cache, columns):
        begin_window(cache, columns)
        cache._cells.view_as(columns)[:, 0] += cache.max_len - 1 - columns[:, 0]  # stored where nothing looks

    monkeypatch.setattr(WindowCache, "begin_window", keeping_the_draft)
    chi2, limit = compare(decoder, 2, 3, draws=8000)
    assert chi2 > 2 * limit


@pytest.mark.parametrize("window", [1, 2, 5, 40])
@pytest.mark.parametrize("cfg", [1.0, 1.5])
def test_temperature_zero_is_greedy_decoding(decoder, window, cfg):
    uncond = UNCOND if cfg != 1 else None
    plain = generate(decoder, PROMPTS, KEYS, steps=20, temperature=0, cfg=cfg, uncond_prompts=uncond)
    out, forwards = run(decoder, PROMPTS, KEYS, 20, window, uncond, temperature=0, cfg=cfg)
    assert torch.equal(out, plain)
    assert forwards <= 20


def test_the_whole_vocabulary_and_single_steps(decoder):
    for steps in (1, 2, 7):
        plain = generate(decoder, PROMPTS, KEYS, steps=steps, temperature=0, vocab_range=None)
        out, _ = run(decoder, PROMPTS, KEYS, steps, 3, vocab_range=None, temperature=0)
        assert torch.equal(out, plain)
    assert int(plain.min()) < TEXT  # or it would be no test of the range


def test_generate_speculates_in_batches(decoder):
    whole, _ = run(decoder, PROMPTS, KEYS, 9, 3, UNCOND, cfg=1.5, top_k=4)
    out = generate(decoder, PROMPTS, KEYS, steps=9, cfg=1.5, top_k=4, speculate=3, uncond_prompts=UNCOND, batch_size=3)
    assert torch.equal(out, whole)


def test_a_sample_depends_on_its_key_not_on_its_place(decoder):
    def samples(order):
        rows = [[side[i] for i in order] for side in (PROMPTS, KEYS, UNCOND)]
        out, _ = run(decoder, rows[0], rows[1], 12, 4, rows[2], cfg=1.5, seed=1)
        return dict(zip(order, out.tolist()))

    whole = samples([0, 1, 2, 3])
    assert samples([3, 1, 0, 2]) == whole
    for i in range(4):
        assert samples([i]) == {i: whole[i]}


def test_seed_and_key_change_the_sample(decoder):
    def sample(seed, key):
        return run(decoder, [PROMPTS[0]], [key], 12, 3, seed=seed)[0].tolist()

    assert sample(0, 1) == sample(0, 1)
    assert sample(0, 1) != sample(1, 1)
    assert sample(0, 1) != sample(0, 2**32 + 1)


@pytest.mark.parametrize(("window", "expected"), [(1, 1 + 10), (3, 1 + 5), (4, 1 + 4), (19, 1 + 1), (96, 1 + 1)])
def test_drafts_of_a_decoder_without_memory_all_stay(window, expected):
    """Where every position has the same distribution a forward gives W + 1 tokens: 20 tokens, one from the prefill."""
    decoder = make_decoder()
    with torch.no_grad():
        decoder.embed.visual[:] = decoder.embed.text[1]
        for layer in decoder.layers:
            layer.out.zero_()
    out, forwards = run(decoder, [[1, 1]] * 50, range(50), 20, window)
    assert forwards == expected
    assert len(out.unique()) > 1


def test_progress_counts_every_final_token_once(decoder):
    seen = []
    _, forwards = run(decoder, PROMPTS, KEYS, 9, 3, progress=seen.append)
    assert seen[0] == len(PROMPTS)
    assert sum(seen) == len(PROMPTS) * 9
    assert len(seen) == forwards
    assert min(seen) >= 1
    assert len(set(seen[1:])) > 1  # rows move at their own speed


class HostReads(TorchDispatchMode):
    """Counts the calls that wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "item", "equal")
        return func(*args, **(kwargs or {}))


def test_the_host_waits_once_a_forward(decoder):
    for steps in (3, 11):
        with HostReads() as reads:
            _, forwards = run(decoder, PROMPTS, KEYS, steps, 3, UNCOND, cfg=2.0, top_k=5, top_p=0.9)
        assert reads.count == forwards + 1  # and one at the end


def test_a_graph_can_replay_the_drafts(decoder, monkeypatch):
    """All that a check reads and writes stays in place, so that on a GPU it is the same work each time."""
    advance, places = Drafts.advance, []

    def noting(drafts, *args):
        advance(drafts, *args)
        places.append({name: x.data_ptr() for name, x in vars(drafts).items() if isinstance(x, torch.Tensor)})

    calls = []

    class Stand:
        def __init__(self, function, device):
            self.function = function

        def __call__(self):
            calls.append(self.function())

    monkeypatch.setattr(speculative, "Replay", Stand)
    monkeypatch.setattr(Drafts, "advance", noting)
    sampling = Sampling(speculate=3)
    out = jacobi_batch(decoder, PROMPTS, KEYS, None, 9, sampling, "visual", None, graph=True)
    assert len(calls) == len(places) > 2
    assert all(place == places[0] for place in places)
    assert torch.equal(out, jacobi_batch(decoder, PROMPTS, KEYS, None, 9, sampling, "visual", None))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_gives_the_same_samples_on_a_gpu(dtype):
    decoder = make_decoder(hidden=64).to("cuda", dtype)
    sampling = Sampling(speculate=3, cfg=1.5, top_k=5, top_p=0.9)
    out = [
        jacobi_batch(decoder, PROMPTS, KEYS, UNCOND, 20, sampling, "visual", None, graph=graph)
        for graph in (False, True)
    ]
    assert torch.equal(*out)


@pytest.mark.parametrize("shape", [{}, {"kv_heads": 1, "qk_norm": True}, {"qkv_bias": True, "head_dim": 16}], ids=str)
@torch.no_grad()
def test_windows_equal_uncached_forwards(shape):
    """Sequences at different places, going on from any token of the window before, as rejected drafts make them."""
    decoder, rng = make_decoder(layers=3, **shape).double(), np.random.default_rng(0)
    tokens = [list(p) for p in (*PROMPTS, PROMPTS[0])]
    windows = Windows(decoder, tokens, 12, 4)
    final = np.ones(5, dtype=np.int64)
    hidden = windows.prefill()
    for row, found in zip(tokens, hidden):
        expected, _ = decoder(PackedBatch.build([Document(np.array(row))], VOCAB))
        torch.testing.assert_close(found, expected[-1], atol=1e-10, rtol=1e-10)
    starts = [len(p) for p in tokens]
    for row in tokens:
        row.append(int(rng.integers(VOCAB.size)))
    for _ in range(5):
        ids = np.c_[[row[-1] for row in tokens], rng.integers(0, VOCAB.size, (5, 3))]
        hidden = windows.forward(torch.from_numpy(ids), torch.from_numpy(final)).view(5, 4, -1)
        for row, window, found in zip(tokens, ids, hidden):
            expected, _ = decoder(PackedBatch.build([Document(np.array([*row[:-1], *window]))], VOCAB))
            torch.testing.assert_close(found, expected[-4:], atol=1e-10, rtol=1e-10)
        for r, row in enumerate(tokens):  # 0 to 3 drafts stay, the next token is another one
            stay = int(rng.integers(0, 4))
            row.extend([*ids[r, 1 : 1 + stay].tolist(), int(rng.integers(VOCAB.size))])
            row[:] = row[: starts[r] + 12]
            final[r] = len(row) - starts[r]


@pytest.mark.parametrize("options", [{}, {"cfg": 2.5}, {"temperature": 0.5, "top_k": 7, "top_p": 0.8}], ids=str)
def test_the_distribution_is_that_of_sample_logits(options):
    torch.manual_seed(0)
    cond, uncond = torch.randn(2, 300, 40) * 3
    sampling = Sampling(**options)
    p, finite = distribution(cond, uncond if sampling.guided else None, sampling)
    tokens, logprob = sample_token(cond, uncond, key_rows(range(300)), 0, sampling)
    found = p.gather(1, tokens[:, None])[:, 0].double() / 2**40
    torch.testing.assert_close(found, logprob.double().exp(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(p.sum(1).double(), torch.full((300,), 2.0**40, dtype=torch.float64), rtol=1e-9, atol=0)
    assert finite.all()


def test_rows_that_are_not_finite_are_told():
    rows = torch.tensor([[0.0, 1.0], [0.0, math.nan], [-math.inf, -math.inf], [0.0, math.inf], [-math.inf, 0.0]])
    for temperature in (0.0, 1.0):
        p, finite = distribution(rows, None, Sampling(temperature=temperature))
        assert finite.tolist() == [True, False, False, False, True]
        assert p[4].tolist() == [0, 2**40]
        assert (p.sum(1) > 0).all()


def words(n: int, seed: int) -> tuple[torch.Tensor, ...]:
    rng = np.random.default_rng(seed)
    return tuple(torch.from_numpy(rng.integers(0, 2**32, (n, 1))) for _ in range(4))


def test_couple_draws_from_p_and_keeps_what_it_can():
    n = 40_000
    q, p = (torch.tensor(x) * 2**30 for x in ([100, 300, 600, 0, 24], [400, 300, 100, 224, 0]))
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.choice(5, (n, 1), p=(q / q.sum()).numpy()))
    new, stays = couple(x, q.expand(n, 1, 5), p.expand(n, 1, 5), words(n, 2))
    share = np.minimum(q, p).sum().item() / 2**40  # 1 less the distance of q and p: no coupling keeps more
    assert abs(stays.double().mean().item() - share) < 4 * math.sqrt(share * (1 - share) / n)
    assert torch.equal(new[stays], x[stays])
    assert (new != x)[~stays].all()
    for outcome in (new, couple(x, torch.zeros(n, 1, 5, dtype=torch.int64), p.expand(n, 1, 5), words(n, 3))[0]):
        chi2, limit = chi_square(np.bincount(outcome[:, 0], minlength=5)[:4], (p[:4] / 2**40 * n).numpy())
        assert chi2 < limit
        assert (outcome != 4).all()


def test_couple_keeps_a_draft_whose_distributions_differ_by_rounding_only():
    q, p = torch.tensor([[[2**39, 2**39 + 1]]]), torch.tensor([[[2**39, 2**39]]])
    top = tuple(torch.full((1, 1), 2**32 - 1) for _ in range(4))
    new, stays = couple(torch.tensor([[1]]), q, p, top)
    assert new.tolist() == [[1]]
    assert stays.all()


@pytest.mark.parametrize(
    ("first", "bad", "expected"),
    [
        (1, (), True),
        (1, (1,), False),  # both drafts stay, so the tokens of the first two rows become final
        (1, (2,), True),  # behind the last step
        (2, (0,), False),  # the first draft is replaced: final, and the others are not
        (2, (1, 2), True),
    ],
)
def test_only_final_tokens_have_to_come_from_finite_logits(first, bad, expected):
    sure = torch.eye(4, dtype=torch.int64) * 2**40
    drafts = Drafts(sure[[1]], torch.ones(1, dtype=torch.bool), 3, 3, 0, key_rows([7]))
    drafts.advance(sure[[first, 1, 1]][None], torch.tensor([[n not in bad for n in range(3)]]))
    assert drafts.finite.item() == expected
    assert drafts.final.item() == (3 if first == 1 else 2)


def test_logits_that_are_not_finite_are_an_error():
    decoder = make_decoder()
    with torch.no_grad():
        decoder.norm.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        run(decoder, PROMPTS, KEYS, 6, 2)
