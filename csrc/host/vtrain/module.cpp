// Python module vtrain._host: the byte and integer work of the data path. Numpy in, numpy out, GIL released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_assemble(py::module_& m);
void bind_bpe(py::module_& m);
void bind_check(py::module_& m);
void bind_crc32c(py::module_& m);
void bind_gather(py::module_& m);
void bind_order(py::module_& m);
void bind_planner(py::module_& m);
void bind_rows(py::module_& m);

PYBIND11_MODULE(_host, m) {
    m.doc() = "Host-side primitives of vtrain";
    bind_assemble(m);
    bind_bpe(m);
    bind_check(m);
    bind_crc32c(m);
    bind_gather(m);
    bind_order(m);
    bind_planner(m);
    bind_rows(m);
}
