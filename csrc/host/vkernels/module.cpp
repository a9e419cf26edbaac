// Python module vkernels._host: the host side of the kernels. Numpy in, results into numpy arrays, GIL released.
#include <algorithm>

#include "vkernels/host.h"

void bind_adamw(py::module_& m);
void bind_attention(py::module_& m);
void bind_attention_tiles(py::module_& m);
void bind_embed_order(py::module_& m);
void bind_rows(py::module_& m);
void bind_rows_norms(py::module_& m);
void bind_sampling(py::module_& m);

PYBIND11_MODULE(_host, m) {
    m.doc() = "Host kernels of vkernels";
    m.def("isa_level", [] { return isa_level(); }, "The instruction set in use: 2 AVX-512, 1 AVX2, 0 baseline.");
    m.def(
        "limit_isa", [](int level) { isa_level() = std::min(std::max(level, 0), widest_isa()); }, py::arg("level"),
        "Use no wider an instruction set than `level` (for tests).");
    bind_adamw(m);
    bind_attention(m);
    bind_attention_tiles(m);
    bind_embed_order(m);
    bind_rows(m);
    bind_rows_norms(m);
    bind_sampling(m);
}
