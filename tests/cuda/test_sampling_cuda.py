"""The CUDA kernel of sampling: run on the host thread by thread by emulate.h, and compiled for sm_90a by nvcc."""

import contextlib
import ctypes
import math
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import vkernels
from vkernels import cuda, registry, sampling
from vkernels.check.sampling import CHECKS

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SOURCE = ROOT / "csrc/cuda/sampling.cu"
CPU = torch.device("cpu")
NVCC = shutil.which("nvcc")
load_library = cuda.library  # some tests put another function in its place
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def emulated(source: Path, folder: Path, *options: str) -> Path:
    """A library of the kernels in `source` that runs them on the host."""
    for header in ("cuda_runtime", "cuda_bf16", "cuda_fp16"):
        (folder / f"{header}.h").write_text('#include "emulate.h"\n')
    library = folder / "emulated.so"
    language = ["-x", "c++", "-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    includes = [f"-I{folder}", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *language, *warnings, *includes, *options, str(source), "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return cuda.library(emulated(SOURCE, tmp_path_factory.mktemp("emulated")))


@pytest.fixture
def on_host(library, monkeypatch):
    """sample_logits is served by the CUDA launch with the emulated kernel."""
    monkeypatch.setattr(cuda, "library", lambda: library)
    backend = registry.Backend(sampling._cuda_forward, None, registry.anywhere)
    monkeypatch.setitem(registry._table["sample_logits"], "cuda", backend)
    with vkernels.force("sample_logits", "cuda"):
        yield
    library.emulate_order(0)


def both(logits, **setting):
    """(ids, logprob) of the CUDA kernel and of the torch backend."""
    draw = {"seed": 5, "step": 7, "return_logprob": True, **setting}
    ours = vkernels.sample_logits(logits, **draw)
    with vkernels.force("sample_logits", "torch"):
        return ours, vkernels.sample_logits(logits, **draw)


def assert_equal(ours, theirs):
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-7, rtol=1e-6, equal_nan=True)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.name)
def test_against_float64(check, dtype):
    for finding in check.run(CPU, dtype):
        assert finding.fine, finding


SETTINGS = [
    {},
    {"top_k": 1},
    {"top_k": 30, "temperature": 0.7},
    {"top_p": 0.6},
    {"top_p": 1e-9},
    {"guidance": 6.0, "top_k": 300, "top_p": 0.95},
    {"guidance": 0.5, "penalty": 1.3, "top_p": 0.3, "lo": 7},
    {"guidance": 3.0, "penalty": 1.1, "temperature": 0.0},
]


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("columns", [8, 32, 33, 1023, 1025, 4100, 33333])
def test_ids_are_those_of_the_torch_backend(columns, setting):
    torch.manual_seed(columns)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits, uncond = (3 * torch.randn(2, 2, columns)).to(dtype)
        assert_equal(*both(logits, uncond=uncond, seen=torch.rand(2, columns) < 0.3, **setting))


@pytest.mark.usefixtures("on_host")
def test_ties_and_flat_rows():
    torch.manual_seed(0)
    rows = torch.stack([torch.zeros(3000), torch.randint(-2, 3, (3000,)) / 2, torch.full((3000,), -7.5)])
    rows[0, ::2] = -0.0
    for setting in ({}, {"top_k": 10}, {"top_p": 0.5}, {"top_k": 10, "top_p": 0.9}, {"temperature": 0.0}):
        assert_equal(*both(rows, **setting))


@pytest.mark.usefixtures("on_host")
def test_rows_without_a_valid_logit():
    inf, nan = math.inf, math.nan
    rows = torch.tensor([[0.0, 1.0, -inf], [0.0, nan, 1.0], [-inf] * 3, [0.0, inf, 1.0], [-inf, -inf, 0.0]])
    for setting in ({}, {"top_k": 2}, {"top_p": 0.9}, {"temperature": 0.0}):
        ours, theirs = both(rows, **setting)
        assert_equal(ours, theirs)
        assert ours[1].isfinite().tolist() == [True, False, False, False, True]


@pytest.mark.usefixtures("on_host")
def test_streams_and_strides():
    torch.manual_seed(0)
    wide = torch.randn(70, 6)
    keys = torch.tensor([2**62 + 5, -1, 0, 3, 2**32, 9])
    assert_equal(*both(wide.T, keys=keys, seed=-3, step=torch.tensor(2**40 + 1)))
    rows = torch.randn(6, 2, 70)
    assert_equal(*both(rows[:, 0], uncond=rows[:, 1], guidance=2.0, keys=keys, top_k=9, lo=3, hi=66))


def agrees_in_any_order(library, orders: int) -> bool:
    torch.manual_seed(0)
    rows = [x for n in (40, 2500) for x in (3 * torch.randn(1, n), torch.randint(-8, 9, (1, n)) / 4)]
    for order in range(1, orders):
        library.emulate_order(order)
        for logits in rows:
            for setting in ({"top_k": 20, "top_p": 0.9}, {"top_p": 0.6}, {"temperature": 0.0}, {}):
                ours, theirs = both(logits, **setting)
                if not (torch.equal(ours[0], theirs[0]) and torch.allclose(ours[1], theirs[1])):
                    return False
    return True


@pytest.mark.usefixtures("on_host")
def test_the_order_of_threads_does_not_matter(library):
    assert agrees_in_any_order(library, 4)


BARRIERS = [m.start() for m in re.finditer(r"__syncthreads\(\);", SOURCE.read_text())]


@pytest.mark.slow
@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("barrier", range(len(BARRIERS)))
def test_every_barrier_is_needed(barrier, tmp_path, monkeypatch):
    """Without it a result is wrong in some order: the test above sees a barrier that is missing."""
    text, at = SOURCE.read_text(), BARRIERS[barrier]
    (tmp_path / "less.cu").write_text(text[:at] + text[at:].replace("__syncthreads();", "", 1))
    less = load_library(emulated(tmp_path / "less.cu", tmp_path))
    monkeypatch.setattr(cuda, "library", lambda: less)
    try:
        assert not agrees_in_any_order(less, 20)
    except RuntimeError as e:
        assert "divergence" in str(e)  # noqa: PT017


EMULATED = """
#include <cuda_runtime.h>
struct In { int kind; int* out; };
__global__ void kernel(In in) {
    __shared__ int last, sum, seen[64];
    const int t = threadIdx.x;
    if (in.kind == 0) {  // as it should be: the sum over the lanes of each warp, and an exchange by shared memory
        int x = t;
        for (int d = 16; d; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
        seen[t] = x + __shfl_up_sync(0xffffffffu, t, 1) + (__ballot_sync(0xffffffffu, t % 2) == 0xaaaaaaaau);
        __syncthreads();
        in.out[t] = seen[63 - t] * 100 + __shfl_sync(0xffffffffu, t, 5);
    }
    if (in.kind == 1) last = t, in.out[0] = last;  // a race
    if (in.kind == 2 && t < 40) __syncthreads();  // a barrier that some never reach
    if (in.kind == 3) { if (t < 32) __syncthreads(); else __syncthreads(); }
    if (in.kind == 3) atomicAdd(&sum, 1);
    if (in.kind == 4 && t != 3) __ballot_sync(0xffffffffu, 1);
    if (in.kind == 5) { if (t < 40) {
        __syncthreads(); } else {
        __syncthreads(); } }
}
extern "C" int launch(int kind, int* out) {
    In in{kind, out};
    void* arguments[] = {&in};
    return cudaLaunchKernel(kernel, dim3(2), dim3(64), arguments, 0, nullptr);
}
extern "C" const char* why() { return cudaGetErrorString(cudaErrorLaunchFailure); }
"""


def test_the_emulator(tmp_path):
    (tmp_path / "kernel.cu").write_text(EMULATED)
    tool = ctypes.CDLL(str(emulated(tmp_path / "kernel.cu", tmp_path)))
    tool.why.restype = ctypes.c_char_p
    out = (ctypes.c_int * 64)()
    lanes = [sum(range(32)), sum(range(32, 64))]
    mine = [lanes[t // 32] + (t - 1 if t % 32 else t) + 1 for t in range(64)]
    for order in (0, 1, 7):
        tool.emulate_order(order)
        assert tool.launch(0, out) == 0
        assert list(out) == [mine[63 - t] * 100 + t // 32 * 32 + 5 for t in range(64)]
    raced = set()
    for order in range(8):
        tool.emulate_order(order)
        assert tool.launch(1, out) == 0
        raced.add(out[0])
    assert len(raced) > 2
    tool.emulate_order(0)
    assert tool.launch(3, out) == 0  # the same line
    for kind, places in ((2, ("at __syncthreads", "at its end")), (4, ("at a warp function", "at its end")),
                         (5, ("at __syncthreads", "at __syncthreads"))):  # fmt: skip
        assert tool.launch(kind, out) == 719
        found = re.fullmatch(
            r"divergence: thread \d+ is (.*), line \d+; thread \d+ is (.*), line \d+", tool.why().decode()
        )
        assert sorted(found.groups()) == sorted(places)


def test_without_the_library_other_backends_serve(tmp_path, monkeypatch):
    cuda.on_cuda.cache_clear()
    assert "tensors are on cpu" in cuda.on_cuda(CPU)
    plain = cuda.library.__wrapped__
    monkeypatch.setattr(cuda, "library", lambda: plain(tmp_path / "none.so"))
    assert "none.so" in cuda.on_cuda(torch.device("cuda", 0))
    cuda.on_cuda.cache_clear()


def test_a_library_of_other_sources_is_refused(library, monkeypatch):
    class Sampling(cuda.Sampling):
        _fields_ = [("more", ctypes.c_int64)]

    monkeypatch.setattr(cuda, "Sampling", Sampling)
    with pytest.raises(ImportError, match="built from other sources"):
        cuda.library.__wrapped__(Path(library._name))


def test_a_launch_that_fails_is_an_error(on_host, monkeypatch):
    monkeypatch.setitem(cuda.TYPES, torch.float32, 9)
    with pytest.raises(RuntimeError, match="vk_sample"):
        vkernels.sample_logits(torch.zeros(1, 4), seed=0, step=0)


def test_a_launch_is_made_on_the_device_of_its_tensors(monkeypatch):
    """And the thread's own device comes back: the library sets one and leaves it so."""
    seen, device = [], torch.device("cuda", 1)

    @contextlib.contextmanager
    def device_is(device):
        seen.append(f"to {device}")
        yield
        seen.append("back")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device_is)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=5))
    calls = SimpleNamespace(vk_sample=lambda parameters, stream: seen.append(f"launch on {stream}") or 0,
                            vk_ready=lambda index: seen.append(f"ready {index}") or 0)  # fmt: skip
    monkeypatch.setattr(cuda, "library", lambda: calls)
    cuda.call("vk_sample", cuda.Sampling(), device)
    assert seen == ["to cuda:1", "launch on 5", "back"]
    seen.clear()
    assert cuda.on_cuda.__wrapped__(device) is None
    assert seen == ["to cuda:1", "ready 1", "back"]


GUARDED = """
import sys
sys.path[:0] = [{here!r}]
from test_sampling_cuda import *
cuda.library = lambda found=load_library(Path({library!r})): found
registry._table["sample_logits"]["cuda"] = registry.Backend(sampling._cuda_forward, None, registry.anywhere)
sampling._fake = lambda logits: tuple(guarded(torch.zeros(len(logits), dtype=t)) for t in (torch.int64, torch.float32))
vkernels.force("sample_logits", "cuda")
torch.manual_seed(0)
for columns in (1, 31, 33, 1025, 4100):
    for dtype in (torch.float32, torch.bfloat16):
        logits, uncond = (guarded((3 * torch.randn(2, columns)).to(dtype)) for _ in range(2))
        step, keys = guarded(torch.tensor([3])).view(()), guarded(torch.tensor([4, 5]))
        seen = guarded(torch.rand(2, columns) < 0.3)
        for setting in SETTINGS:
            if setting.get("lo", 0) < columns:
                vkernels.sample_logits(logits, uncond=uncond, seen=seen, seed=1, step=step, keys=keys, **setting)
        logits[0] = float("nan")
        vkernels.sample_logits(logits, seed=1, step=step)
if {outside}:
    sampling._cuda_forward(logits, None, None, step, None, 1, 1.0, 1.0, 1.0, 0, 1.0, 0, columns + 1)
"""


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A copy of x right before a page that nobody may touch."""
    size = x.numel() * x.element_size()
    pages = -(-size // mmap.PAGESIZE) + 1
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    last = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + (pages - 1) * mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(last), mmap.PAGESIZE, 0) == 0
    offset = (pages - 1) * mmap.PAGESIZE - size
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape).copy_(x)


@pytest.mark.slow
@pytest.mark.parametrize("outside", [False, True])
def test_no_access_outside_of_a_buffer(tmp_path, outside):
    """Undefined behaviour and indices of arrays are checked by the compiler, buffers by pages behind them."""
    checks = ["-g", "-fsanitize=undefined", "-fno-sanitize-recover=all", "-static-libubsan"]
    code = GUARDED.format(here=str(HERE), library=str(emulated(SOURCE, tmp_path, *checks)), outside=outside)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (-signal.SIGSEGV if outside else 0), done.stderr


@needs_nvcc
def test_what_nvcc_makes_of_it(tmp_path):
    command = [NVCC, "-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", "-gencode", "arch=compute_90a,code=sm_90a", "-cubin"]
    options = ["-Xptxas", "-v", "-Werror", "all-warnings", str(SOURCE), "-o", str(tmp_path / "sampling.cubin")]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills == [("0", "0", "0")] * 3, done.stderr
    used = re.findall(r"Used (\d+) registers.*?(\d+) bytes smem", done.stderr)
    # 1024 threads have 64 registers each; two blocks share the 227 KB of a multiprocessor with room to spare.
    assert len(used) == 3
    assert all(int(registers) <= 64 and int(shared) <= 20 << 10 for registers, shared in used), used


SETUP = """
import os, runpy, setuptools, sys
from pathlib import Path
setuptools.setup = lambda **arguments: kept.update(arguments)
kept = {}
scope = runpy.run_path("setup.py")
scope["build_ext"].run = lambda self: None  # the host extensions are not what is tested here
command = kept["cmdclass"]["build_ext"](setuptools.Distribution())
command.inplace, command.build_lib = False, sys.argv[1]
command.run()
"""


def run_setup(folder: Path, **environment) -> subprocess.CompletedProcess:
    code = [sys.executable, "-c", SETUP, str(folder)]
    return subprocess.run(code, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def test_setup_without_nvcc(tmp_path):
    done = run_setup(tmp_path, PATH="", VTRAIN_CUDA="")
    assert done.returncode == 0, done.stderr
    assert "the CUDA kernels are left out: no nvcc in PATH" in done.stdout + done.stderr
    done = run_setup(tmp_path, PATH="", VTRAIN_CUDA="1")
    assert done.returncode != 0
    assert "no nvcc in PATH" in done.stderr
    assert run_setup(tmp_path, VTRAIN_CUDA="0").returncode == 0
    assert list(tmp_path.iterdir()) == []


@needs_nvcc
@pytest.mark.slow
def test_setup_with_nvcc(tmp_path):
    done = run_setup(tmp_path, VTRAIN_CUDA="1")
    assert done.returncode == 0, done.stderr
    (built,) = (tmp_path / "vkernels").iterdir()
    assert built.name == cuda.PATH.name
    library = cuda.library(built)  # it loads without a driver
    assert library.vk_sampling_bytes() == ctypes.sizeof(cuda.Sampling)
    written = built.stat().st_mtime_ns
    assert run_setup(tmp_path, VTRAIN_CUDA="1").returncode == 0
    assert built.stat().st_mtime_ns == written  # it was up to date
