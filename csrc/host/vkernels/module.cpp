// Python module vkernels._host: the host side of the kernels. Numpy in, results into numpy arrays, GIL released.
#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_attention(py::module_& m);
void bind_rows(py::module_& m);

PYBIND11_MODULE(_host, m) {
    m.doc() = "Host kernels and tables of vkernels";
    bind_attention(m);
    bind_rows(m);
}
