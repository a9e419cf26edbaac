// Python module vkernels._host: host-built index tables that kernels consume. Numpy in, numpy out, GIL released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_host, m) { m.doc() = "Host-side tables for vkernels"; }
