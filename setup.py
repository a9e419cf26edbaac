"""Builds the two host extensions. They are plain C++17 over numpy: torch is neither imported nor linked."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext, naive_recompile
from setuptools import setup

# Objects build in parallel, and only those whose source changed: an edit costs seconds in an editable checkout.
ParallelCompile("VTRAIN_BUILD_JOBS", default=0, needs_recompile=naive_recompile).install()


def host_extension(package: str) -> Pybind11Extension:
    return Pybind11Extension(
        f"{package}._host",
        sorted(glob(f"csrc/host/{package}/*.cpp")),
        include_dirs=["csrc/host"],
        depends=sorted(glob("csrc/host/**/*.h", recursive=True)),
        cxx_std=17,
        extra_compile_args=["-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-g0"],
    )


setup(ext_modules=[host_extension("vtrain"), host_extension("vkernels")], cmdclass={"build_ext": build_ext})
