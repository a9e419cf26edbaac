"""adamw_step and clip_factor against float64, torch.optim.AdamW and each other."""

import math
from types import SimpleNamespace

import pytest
import torch

import vkernels
from vkernels import _host, oracle, tables
from vkernels.check.adamw import AWKWARD, CHECKS
from vkernels.philox import philox


def problem(shapes=AWKWARD, moments=torch.float32, grads=torch.float32, seed=0):
    """-> (params, grads, exp_avgs, exp_avg_sqs)."""
    g = torch.Generator().manual_seed(seed)
    draw = [[torch.randn(s, generator=g) for s in shapes] for _ in range(4)]
    kinds = torch.float32, grads, moments, moments
    draw[3] = [x.abs() for x in draw[3]]
    return [[x.to(kind) for x in tensors] for tensors, kind in zip(draw, kinds)]


def same(a, b):
    return all(torch.equal(x, y) for one, two in zip(a, b) for x, y in zip(one, two))


def copied(lists):
    return [[x.clone() for x in tensors] for tensors in lists]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", [c for c in CHECKS if c.small], ids=lambda c: f"{c.op}-{c.name}")
def test_against_float64(backend, check, dtype):
    for finding in check.run(torch.device("cpu"), dtype):
        assert finding.fine, finding


def test_equals_torch_after_100_steps(backend):
    """Two groups' weight decays in one call, a schedule, and clipping."""
    shapes, decays = [(17, 5), (31,)], [0.1, 0.0]
    params, _, exp_avgs, exp_avg_sqs = problem(shapes)
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(theirs, decays)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6)
    for m, v in zip(exp_avgs, exp_avg_sqs):
        m.zero_(), v.zero_()
    step = torch.zeros((), dtype=torch.int64)
    for t in range(100):
        grads = [torch.randn(s) * 3 for s in shapes]
        lr = 3e-3 * math.cos(t / 70)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p, g in zip(theirs, grads):
            p.grad = g.clone()
        theirs_norm = torch.nn.utils.clip_grad_norm_(theirs, 2.0)
        optimizer.step()
        factor, norm = vkernels.clip_factor(grads, 2.0)
        torch.testing.assert_close(norm, theirs_norm, rtol=1e-6, atol=0)
        vkernels.adamw_step(params, grads, exp_avgs, exp_avg_sqs, step=step, lr=lr, betas=(0.9, 0.95), eps=1e-6,
                            weight_decay=decays, grad_scale=factor)  # fmt: skip
    assert step == 100
    for ours, other in zip(params, theirs):
        torch.testing.assert_close(ours, other.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_a_step_that_is_not_kept_changes_nothing(backend, moments):
    lists = problem(moments=moments)
    copies = [p.bfloat16() for p in lists[0]]
    lists[1][1][5] = math.nan
    step = torch.tensor(3.0)
    before = copied([*lists, copies])
    factor, norm = vkernels.clip_factor(lists[1], 1.0)
    assert norm.isnan()
    options = {"step": step, "lr": 0.1, "copies": copies, "grad_scale": factor, "kept": norm.isfinite()}
    vkernels.adamw_step(*lists, **options)
    after = [*lists, copies]
    assert step == 3
    assert same(before[:1] + before[2:], after[:1] + after[2:])
    vkernels.adamw_step(*lists, **options, zero_grads=True)
    assert same(before[:1] + before[2:], after[:1] + after[2:])
    assert all((g == 0).all() for g in lists[1])
    vkernels.adamw_step(*lists, step=step, lr=0.1, kept=torch.ones(1))
    assert step == 4


def test_ways_to_give_step_and_lr(backend):
    """Numbers and tensors of any dtype and one element mean the same."""
    results = []
    for step, lr in (
        (4, 0.01),
        (torch.tensor(4.0), torch.tensor(0.01, dtype=torch.float64)),
        (torch.tensor([4]), 0.01),
    ):
        lists = problem()
        vkernels.adamw_step(*lists, step=step, lr=lr)
        results.append(lists)
        assert not isinstance(step, torch.Tensor) or step == 5
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_gradients_are_zeroed_in_the_same_pass(backend):
    plain, zeroed = problem(grads=torch.bfloat16), problem(grads=torch.bfloat16)
    vkernels.adamw_step(*plain, step=0, lr=0.01)
    vkernels.adamw_step(*zeroed, step=0, lr=0.01, zero_grads=True)
    assert all((g == 0).all() for g in zeroed[1])
    assert same([plain[0], *plain[2:]], [zeroed[0], *zeroed[2:]])


def test_views_that_begin_anywhere(backend):
    """As FSDP hands out gradients: slices of one flat buffer, at addresses of any multiple of the element's size."""
    shapes = [(3, 7), (4096,), (5,), (4099,)]
    lists = problem(shapes, grads=torch.bfloat16)
    flat = torch.cat([torch.zeros(1, dtype=torch.bfloat16), *[g.flatten() for g in lists[1]]])
    at, views = 1, []
    for s in shapes:
        n = math.prod(s)
        views.append(flat[at : at + n].view(s))
        at += n
    other = copied(lists)
    vkernels.adamw_step(*lists, step=0, lr=0.01)
    vkernels.adamw_step(other[0], views, *other[2:], step=0, lr=0.01)
    assert same([lists[0], *lists[2:]], [other[0], *other[2:]])
    a, b = vkernels.clip_factor(lists[1], 1.0)[1], vkernels.clip_factor(views, 1.0)[1]
    assert torch.equal(a, b)


def test_random_words_are_philox():
    """Known answers of the Random123 library, kat_vectors, philox4x32 with 10 rounds."""
    for word, seed, expected in (
        (0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0xFFFFFFFF, (1 << 64) - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ):
        found = philox(seed, [torch.tensor(word)] * 4)
        assert [int(x) for x in found] == expected == oracle.philox([word] * 4, [seed & 0xFFFFFFFF, seed >> 32])


@pytest.mark.parametrize(("level", "seed"), [(0, (7 << 40) + 3), (1, -5), (2, (1 << 63) + 9)])
def test_stochastic_rounding_has_the_same_bits_everywhere(level, seed):
    """Every instruction set and plain torch draw the same words; gradients of 0 leave no other rounding."""
    widest = _host.isa_level()
    _host.limit_isa(level)
    try:
        results = []
        for name in ("cpu", "torch"):
            lists = problem([(4099,), (0,), (33, 5)], moments=torch.bfloat16)
            for g in lists[1]:
                g.zero_()
            with vkernels.force("adamw_step", name):
                vkernels.adamw_step(*lists, step=(1 << 31) + 5, lr=0.0, seed=seed)
            results.append(lists[2:])
        assert same(*results)
    finally:
        _host.limit_isa(widest)


def test_stochastic_rounding_is_unbiased_and_repeatable(backend):
    def run(seed, step):
        n = 1 << 16
        lists = [[torch.zeros(n)], [torch.zeros(n)], [torch.ones(n).bfloat16()], [torch.ones(n).bfloat16()]]
        vkernels.adamw_step(*lists, step=step, lr=0.0, betas=(0.9, 0.999), seed=seed)
        return lists[2][0], lists[3][0]

    first = run(5, 0)
    assert same([first], [run(5, 0)])
    assert not same([first], [run(6, 0)])
    assert not same([first], [run(5, 1)])
    for moment, exact in zip(first, (0.9, 0.999)):
        values = moment.double()
        assert values.unique().numel() == 2  # the two neighbours
        spread = float(values.std())
        assert abs(float(values.mean()) - exact) < 5 * spread / math.sqrt(values.numel())
    m, v = (x.double() - x.double().mean() for x in first)
    assert abs(float((m * v).mean() / (m.std() * v.std()))) < 5 / math.sqrt(m.numel())  # drawn apart


def test_bf16_moments_do_not_stall(backend):
    """Rounded to nearest, an average that moves by 1 in 1000 a step would stand still at 0.25 of its way."""
    n, steps = 2048, 400
    lists = [[torch.zeros(n)], [torch.ones(n)], [torch.zeros(n).bfloat16()], [torch.zeros(n).bfloat16()]]
    step = torch.zeros(())
    for _ in range(steps):
        vkernels.adamw_step(*lists, step=step, lr=1e-3)
    assert abs(float(lists[3][0].double().mean()) / (1 - 0.999**steps) - 1) < 5e-3


def test_not_finite_values_stay_not_finite_in_bf16(backend):
    lists = problem([(6,)], moments=torch.bfloat16)
    lists[1][0][:4] = torch.tensor([math.nan, math.inf, -math.inf, 3e38])
    vkernels.adamw_step(*lists, step=0, lr=0.0)
    assert lists[2][0][0].isnan()
    assert lists[2][0][1:3].tolist() == [math.inf, -math.inf]
    assert lists[3][0][1:4].tolist() == [math.inf] * 3
    assert lists[2][0][3:].isfinite().all()


def test_the_same_bits_on_any_number_of_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            lists = problem([(700, 513), (9,)], moments=torch.bfloat16)
            norm = vkernels.clip_factor(lists[1], 1.0)[1]
            vkernels.adamw_step(*lists, step=0, lr=0.01)
            results.append([*lists, [norm]])
    finally:
        torch.set_num_threads(before)
    assert same(*results)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_instruction_set(level):
    widest = _host.isa_level()
    _host.limit_isa(level)
    try:
        for finding in CHECKS[0].run(torch.device("cpu"), torch.bfloat16):
            assert finding.fine, finding
    finally:
        _host.limit_isa(widest)


def test_clip_factor(backend):
    grads = [torch.full((3,), 2.0), torch.full((4,), 1.0, dtype=torch.bfloat16)]
    factor, norm = vkernels.clip_factor(grads, 2.0)
    assert norm == 4
    torch.testing.assert_close(factor, torch.tensor(0.5))
    assert vkernels.clip_factor(grads, 8.0)[0] == 1
    assert vkernels.clip_factor(grads, 0.0)[0] == 1
    assert vkernels.clip_factor(grads, 2.0, start=torch.tensor(math.nan))[1].isnan()
    assert vkernels.clip_factor(grads, 2.0, reduce=lambda square: square.mul_(4))[1] == 8
    start = torch.tensor(9.0)
    assert vkernels.clip_factor([], 2.0, start=start, reduce=lambda square: square.mul_(4))[1] == 6
    assert start == 9
    assert vkernels.clip_factor([torch.zeros(0)], 2.0)[1] == 0
    assert vkernels.clip_factor([torch.tensor([math.inf])], 2.0)[1] == math.inf


def test_other_dtypes_fall_back_to_torch():
    """The host kernel takes float32 and bf16; float64 weights and float16 gradients go another way, to the same end."""
    wide = [[x.double() for x in tensors] for tensors in problem()]
    plain = problem()
    vkernels.adamw_step(*wide, step=0, lr=0.01)
    vkernels.adamw_step(*plain, step=0, lr=0.01)
    for a, b in zip(wide[0], plain[0]):
        torch.testing.assert_close(a.float(), b, rtol=1e-6, atol=1e-6)
    half = problem(grads=torch.float16)
    vkernels.adamw_step(*half, step=0, lr=0.01, copies=[p.half() for p in half[0]])


def test_errors():
    def message(change, **options):
        lists = problem([(4, 2), (3,)])
        change(lists)
        with pytest.raises(ValueError) as caught:
            vkernels.adamw_step(*lists, **{"step": 0, "lr": 0.1, **options})
        text = str(caught.value)
        assert "\n" not in text
        return text.removeprefix("vkernels.adamw_step: ")

    def put(i, j, value):
        def change(lists):
            lists[i][j] = value

        return change

    assert message(lambda lists: lists[1].pop()) == "1 grads, expected 2"
    assert (
        message(put(2, 1, torch.zeros(4))) == "exp_avgs[1] is (4,) with strides (1,), expected 3 elements, contiguous"
    )
    assert "contiguous" in message(put(0, 0, torch.zeros(2, 4).T))
    assert "expected one dtype a call" in message(put(1, 0, torch.zeros(4, 2).bfloat16()))
    assert "params are torch.bfloat16" in message(lambda lists: lists.__setitem__(0, [x.bfloat16() for x in lists[0]]))
    assert "exp_avgs are torch.float16" in message(lambda lists: lists.__setitem__(2, [x.half() for x in lists[2]]))
    assert message(lambda lists: None, weight_decay=[0.1]) == "1 weight decays, expected 2"
    assert message(lambda lists: None, copies=[torch.zeros(8)]) == "1 copies, expected 2"
    elsewhere, two = torch.zeros((), device="meta"), torch.zeros(2)
    assert message(lambda lists: None, step=elsewhere) == "step is [] on meta, expected one element on cpu"
    assert message(lambda lists: None, kept=two) == "kept is [2] on cpu, expected one element on cpu"
    with pytest.raises(ValueError, match="grads are on meta, expected cpu"):
        tables.pointers("adamw_step", "grads", [torch.zeros(3, device="meta")], [3], torch.device("cpu"))
    with pytest.raises(ValueError, match="no gradients and no start"):
        vkernels.clip_factor([], 1.0)


def test_no_tensors():
    vkernels.adamw_step([], [], [], [], step=0, lr=0.1)
    step = torch.tensor(2)
    vkernels.adamw_step([], [], [], [], step=step, lr=0.1)
    assert step == 3
    vkernels.adamw_step([], [], [], [], step=step, lr=0.1, kept=torch.tensor(False))
    assert step == 3


def test_tables_are_found_again_by_what_is_in_them():
    device = torch.device("cpu")
    chunks = tables.resident_chunks(device, (5, 0, 9), 4)
    assert chunks.tolist() == [[0, 0], [0, 1], [2, 0], [2, 1], [2, 2]]
    assert tables.resident_chunks(device, (5, 0, 9), 4) is chunks
    assert tables.resident_chunks(device, (5, 0, 9), 8) is not chunks
    for i in range(tables.KEPT + 1):
        tables.resident_numbers(device, (i,), torch.int64)
    assert tables.resident_chunks(device, (5, 0, 9), 4) is not chunks
    assert len(tables._tables) == tables.KEPT


def test_a_capture_finds_the_tables_of_a_step_on_another_stream(monkeypatch):
    """As torch captures: a step on a side stream first, then the graph on a stream of its own."""
    device, capturing, streams = torch.device("cuda", 0), [False], iter([1, 2])
    monkeypatch.setattr(tables, "_tables", type(tables._tables)())
    monkeypatch.setattr(tables, "_in_graphs", [])
    monkeypatch.setattr(tables, "_upload", lambda table, device: table)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=next(streams)))
    first = tables.resident_numbers(device, (1, 2), torch.int64)
    assert tables.resident_numbers(device, (1, 2), torch.int64) is not first  # each stream has its own
    capturing[0] = True
    assert any(tables.resident_numbers(device, (1, 2), torch.int64) is t for t in tables._tables.values())
    assert len(tables._in_graphs) == 1
    with pytest.raises(ValueError, match="expected a step before the capture"):
        tables.resident_numbers(device, (1, 3), torch.int64)


def test_versions_and_registration():
    lists = problem([(4, 2), (3,)])
    saved = lists[0][0].requires_grad_()
    loss = (saved * saved).sum()
    vkernels.adamw_step(*lists, step=0, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    lists = problem([(4, 2), (3,)])
    args = (torch.zeros(()), *lists, [], [0.1, 0.0], torch.tensor(0.1), 0.9, 0.99, 1e-8, None, None, True, 3)
    torch.library.opcheck(torch.ops.vkernels.adamw_step.default, args)
    torch.library.opcheck(torch.ops.vkernels.square_sum.default, (torch.zeros(()), lists[1]))


def test_compiles():
    def step(*tensors):
        params, grads, exp_avgs, exp_avg_sqs = [tensors[i : i + 2] for i in range(0, 8, 2)]
        factor, norm = vkernels.clip_factor(grads, 1.0)
        vkernels.adamw_step(params, grads, exp_avgs, exp_avg_sqs, step=tensors[8], lr=0.1, grad_scale=factor)
        return norm

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        tensors = [x for part in problem([(4, 2), (3,)]) for x in part] + [torch.zeros(())]
        norm = run(*tensors)
        results.append([*tensors, norm])
    assert same([results[0]], [results[1]])
