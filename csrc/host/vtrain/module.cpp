// Python module vtrain._host: the byte and integer work of the data path. Numpy in, numpy out, GIL released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_bpe(py::module_& m);
void bind_crc32c(py::module_& m);

PYBIND11_MODULE(_host, m) {
    m.doc() = "Host-side primitives of vtrain";
    bind_bpe(m);
    bind_crc32c(m);
}
