// Row-wise host kernels, float and double: SwiGLU, rotary embedding, and rows gathered or summed by index.
#include <cmath>
#include <cstring>
#include <limits>

#include "vkernels/rows.h"

namespace {

template <class T>
struct SwiGlu {
    const T *gate, *up;
    int64_t gate_stride, up_stride, F;
    T* y;
    const T* dy = nullptr;
    T *dgate = nullptr, *dup = nullptr;
    int64_t dy_stride = 0, dgate_stride = 0, dup_stride = 0;
};

template <class T>
struct Rope {
    const T *x, *cosine, *sine;
    int64_t stride, H, D;
    T sign;  // -1 turns back
    T* y;
};

template <class T>
struct AddRows {
    const T* rows;
    const int64_t* ids;
    int64_t N, C, base, size;
    T* sums;
};

#define VK_KERNELS "vkernels/rows_kernels.h"
#include "vkernels/foreach_isa.h"

template <class T>
void bind_swiglu(py::module_& m) {
    m.def(
        "swiglu_forward",
        [](const py::array_t<T>& gate, const py::array_t<T>& up, Dense<T>& y, int threads) {
            const char* bad = "swiglu: expected gate, up, y[N, F]";
            require(gate.ndim() == 2, bad);
            const int64_t N = gate.shape(0), F = gate.shape(1);
            SwiGlu<T> p{gate.data(), up.data(), row_stride(gate, N, F, bad), row_stride(up, N, F, bad), F,
                        rows_of(y, N, F, bad)};
            auto kernel = VK_PICK(swiglu_forward<T>);
            over_rows(N, F, threads, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
        },
        py::arg("gate").noconvert(), py::arg("up").noconvert(), py::arg("y").noconvert(), py::arg("threads"),
        "Writes y[N, F] = silu(gate) * up.");
    m.def(
        "swiglu_backward",
        [](const py::array_t<T>& dy, const py::array_t<T>& gate, const py::array_t<T>& up, py::array_t<T>& dgate,
           py::array_t<T>& dup, int threads) {
            const char* bad = "swiglu: expected dy, gate, up, dgate, dup[N, F]";
            require(gate.ndim() == 2, bad);
            const int64_t N = gate.shape(0), F = gate.shape(1);
            SwiGlu<T> p{gate.data(), up.data(), row_stride(gate, N, F, bad), row_stride(up, N, F, bad), F, nullptr};
            p.dy = dy.data();
            p.dgate = dgate.mutable_data();
            p.dup = dup.mutable_data();
            p.dy_stride = row_stride(dy, N, F, bad);
            p.dgate_stride = row_stride(dgate, N, F, bad);
            p.dup_stride = row_stride(dup, N, F, bad);
            auto kernel = VK_PICK(swiglu_backward<T>);
            over_rows(N, F, threads, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
        },
        py::arg("dy").noconvert(), py::arg("gate").noconvert(), py::arg("up").noconvert(),
        py::arg("dgate").noconvert(), py::arg("dup").noconvert(), py::arg("threads"), "Writes dgate and dup [N, F].");
}

template <class T>
void bind_rope(py::module_& m) {
    m.def(
        "rope",
        [](const py::array_t<T>& x, Dense<T>& cosine, Dense<T>& sine, bool inverse, Dense<T>& y, int threads) {
            const char* bad = "rope: expected x, y[T, H, D] with D even, cos, sin[T, D / 2]";
            require(x.ndim() == 3, bad);
            const int64_t N = x.shape(0), H = x.shape(1), D = x.shape(2);
            require(D % 2 == 0, bad);
            Rope<T> p{x.data(), rows_of(cosine, N, D / 2, bad), rows_of(sine, N, D / 2, bad),
                      heads_stride(x, N, H, D, bad), H, D, inverse ? T(-1) : T(1),
                      heads_of(y, N, H, D, bad)};
            auto kernel = VK_PICK(rope_rows<T>);
            over_rows(N, H * D, threads, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
        },
        py::arg("x").noconvert(), py::arg("cos").noconvert(), py::arg("sin").noconvert(), py::arg("inverse"),
        py::arg("y").noconvert(), py::arg("threads"), "Writes y[T, H, D], the rotated x.");
}

template <class T>
void bind_add_rows(py::module_& m) {
    m.def(
        "add_rows",
        [](const Dense<T>& rows, const Dense<int64_t>& ids, int64_t base, int64_t size, Dense<T>& sums, int threads) {
            const char* bad = "add_rows: expected rows[N, C], ids int64[N], sums[K, C] with K >= size";
            require(rows.ndim() == 2 && ids.ndim() == 1 && ids.shape(0) == rows.shape(0) && sums.ndim() == 2 &&
                        sums.shape(1) == rows.shape(1) && size <= sums.shape(0),
                    bad);
            const int64_t N = rows.shape(0), C = rows.shape(1), block = 64;
            AddRows<T> p{rows.data(), ids.data(), N, C, base, size, sums.mutable_data()};
            auto kernel = VK_PICK(add_rows<T>);
            py::gil_scoped_release release;
            if (N * C < kWorthThreads || threads <= 1) {
                kernel(p, 0, C);
                return;
            }
            parallel_for((C + block - 1) / block, threads,
                         [&](int64_t b, int) { kernel(p, b * block, std::min(C, (b + 1) * block)); });
        },
        py::arg("rows").noconvert(), py::arg("ids").noconvert(), py::arg("base"), py::arg("size"),
        py::arg("sums").noconvert(), py::arg("threads"),
        "sums[id - base] += row for every row whose id lies in [base, base + size).");
}

// out[i] = the row of ids[i] in the table whose range holds it, or zeros. Rows are bytes, so any element type will do.
void gather_rows(const Dense<int64_t>& ids, const std::vector<Dense<uint8_t>>& tables,
                 const std::vector<int64_t>& bases, const std::vector<int64_t>& sizes, Dense<uint8_t>& out) {
    const char* bad = "gather_rows: expected ids int64[N], out[N, B], tables [rows >= size, B], as many bases and sizes";
    require(ids.ndim() == 1 && out.ndim() == 2 && out.shape(0) == ids.shape(0), bad);
    require(tables.size() == bases.size() && tables.size() == sizes.size(), bad);
    const int64_t N = ids.shape(0), width = out.shape(1);
    std::vector<const uint8_t*> first;
    for (size_t t = 0; t < tables.size(); ++t) {
        require(tables[t].ndim() == 2 && tables[t].shape(1) == width && tables[t].shape(0) >= sizes[t], bad);
        first.push_back(tables[t].data());
    }
    const int64_t* id = ids.data();
    uint8_t* to = out.mutable_data();
    py::gil_scoped_release release;
    for (int64_t i = 0; i < N; ++i, to += width) {
        const uint8_t* from = nullptr;
        for (size_t t = 0; t < first.size(); ++t)
            if (id[i] >= bases[t] && id[i] < bases[t] + sizes[t]) from = first[t] + (id[i] - bases[t]) * width;
        if (from)
            std::memcpy(to, from, width);
        else
            std::memset(to, 0, width);
    }
}

}  // namespace

void bind_rows(py::module_& m) {
    bind_swiglu<float>(m);
    bind_swiglu<double>(m);
    bind_rope<float>(m);
    bind_rope<double>(m);
    bind_add_rows<float>(m);
    bind_add_rows<double>(m);
    m.def("gather_rows", &gather_rows, py::arg("ids").noconvert(), py::arg("tables").noconvert(), py::arg("bases"),
          py::arg("sizes"), py::arg("out").noconvert(), "Writes out[N, B], the table rows of the ids; zeros for others.");
}
