"""Builds the two host extensions and, where nvcc is found, the library of CUDA kernels.

The host extensions are plain C++17 over numpy: torch is neither imported nor linked. VTRAIN_CUDA=0 leaves the CUDA
library out, VTRAIN_CUDA=1 insists on it; without either, one that cannot be built is a warning.
"""

import os
import shutil
import subprocess
from glob import glob
from os.path import getmtime
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

HEADERS = sorted(glob("csrc/host/**/*.h", recursive=True) + glob("csrc/common/*.h"))
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cu"))
CUDA_LIBRARY = Path("vkernels/_cuda.so")
# Machine code for Hopper, and PTX that the driver turns into code for any other GPU since Ampere.
NVCC_FLAGS = ["-shared", "-Icsrc", "-O3", "-std=c++17", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden",
              "-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_80,code=compute_80"]  # fmt: skip


def out_of_date(obj: str, src: str) -> bool:
    """Whether an object is older than its source, any header or the compiler flags below."""
    return getmtime(obj) < max(map(getmtime, [src, "setup.py", *HEADERS]))


def host_extension(package: str) -> Pybind11Extension:
    return Pybind11Extension(
        f"{package}._host",
        sorted(glob(f"csrc/host/{package}/*.cpp")),
        include_dirs=["csrc", "csrc/host"],
        depends=["setup.py", *HEADERS],
        cxx_std=17,
        extra_compile_args=["-O3", "-fno-math-errno", "-Wall", "-Wextra", "-fvisibility=hidden", "-g0"],
    )


class BuildAll(build_ext):
    def run(self) -> None:
        super().run()
        wish = os.environ.get("VTRAIN_CUDA", "")
        if wish == "0":
            return
        try:
            build_cuda("kernels" / CUDA_LIBRARY if self.inplace else Path(self.build_lib) / CUDA_LIBRARY)
        except (OSError, subprocess.CalledProcessError) as e:
            if wish == "1":
                raise
            self.warn(f"the CUDA kernels are left out: {e}")


def build_cuda(library: Path) -> None:
    """Compile csrc/cuda into one shared library, unless it is newer than its sources."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("no nvcc in PATH")
    if library.exists() and getmtime(library) >= max(map(getmtime, ["setup.py", *HEADERS, *CUDA_SOURCES])):
        return
    library.parent.mkdir(parents=True, exist_ok=True)
    made = library.with_suffix(".part.so")
    subprocess.run([nvcc, *NVCC_FLAGS, *CUDA_SOURCES, "-o", str(made)], check=True)
    os.replace(made, library)


# Objects build in parallel, and only those that are out of date: an edit costs seconds in an editable checkout.
ParallelCompile("VTRAIN_BUILD_JOBS", default=0, needs_recompile=out_of_date).install()
setup(ext_modules=[host_extension("vtrain"), host_extension("vkernels")], cmdclass={"build_ext": BuildAll})
