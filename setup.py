"""Builds the two host extensions. They are plain C++17 over numpy: torch is neither imported nor linked."""

from glob import glob
from os.path import getmtime

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

HEADERS = sorted(glob("csrc/host/**/*.h", recursive=True))


def out_of_date(obj: str, src: str) -> bool:
    """Whether an object is older than its source, any header or the compiler flags below."""
    return getmtime(obj) < max(map(getmtime, [src, "setup.py", *HEADERS]))


def host_extension(package: str) -> Pybind11Extension:
    return Pybind11Extension(
        f"{package}._host",
        sorted(glob(f"csrc/host/{package}/*.cpp")),
        include_dirs=["csrc/host"],
        depends=["setup.py", *HEADERS],
        cxx_std=17,
        extra_compile_args=["-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-g0"],
    )


# Objects build in parallel, and only those that are out of date: an edit costs seconds in an editable checkout.
ParallelCompile("VTRAIN_BUILD_JOBS", default=0, needs_recompile=out_of_date).install()
setup(ext_modules=[host_extension("vtrain"), host_extension("vkernels")], cmdclass={"build_ext": build_ext})
