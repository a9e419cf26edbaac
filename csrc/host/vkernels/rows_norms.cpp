// RMSNorm, LayerNorm, and RMSNorm of heads with their rotary embedding, float and double.
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "vkernels/rows.h"

namespace {

template <class T>
struct RmsNorm {
    const T *x, *weight;
    int64_t stride, C;
    T eps;
    T *y, *rstd;
    const T *dy = nullptr, *dstream = nullptr;  // dstream: null where there is none
    int64_t dy_stride = 0, dstream_stride = 0;
    T* dx = nullptr;
};

template <class T>
struct LayerNorm {
    const T *x, *weight, *bias;
    int64_t stride, C;
    T eps;
    T *y, *mean, *rstd;
    const T* dy = nullptr;
    int64_t dy_stride = 0;
    T* dx = nullptr;
};

template <class T>
struct NormRope {
    const T *x, *weight, *cosine, *sine;
    int64_t stride, H, D;
    T eps;
    T *y, *rstd;
    const T* dy = nullptr;
    int64_t dy_stride = 0;
    T* dx = nullptr;
};

#define VK_KERNELS "vkernels/rows_norms_kernels.h"
#include "vkernels/foreach_isa.h"

template <class T>
using Rows = py::array_t<T>;  // rows may be apart; `row_stride` says how far

template <class T>
void rms_norm_forward(const Rows<T>& x, Dense<T>& weight, double eps, Dense<T>& y, Dense<T>& rstd, int threads) {
    const char* bad = "rms_norm: expected x[N, C], weight[C], y[N, C], rstd[N]";
    require(x.ndim() == 2, bad);
    const int64_t N = x.shape(0), C = x.shape(1);
    RmsNorm<T> p{x.data(), list_of(weight, C, bad), row_stride(x, N, C, bad), C, static_cast<T>(eps),
                 rows_of(y, N, C, bad), list_of(rstd, N, bad)};
    auto kernel = VK_PICK(rms_norm_forward<T>);
    over_rows(N, C, threads, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

template <class T>
void rms_norm_backward(const Rows<T>& dy, const Rows<T>& x, Dense<T>& weight, Dense<T>& rstd, Dense<T>& dx,
                       Dense<T>& dweight, const std::optional<Rows<T>>& dstream, int threads) {
    const char* bad = "rms_norm: expected dy, x, dx, dstream[N, C], weight, dweight[C], rstd[N]";
    require(x.ndim() == 2, bad);
    const int64_t N = x.shape(0), C = x.shape(1);
    RmsNorm<T> p{x.data(), list_of(weight, C, bad), row_stride(x, N, C, bad), C, T(0), nullptr, list_of(rstd, N, bad)};
    p.dy = dy.data();
    p.dy_stride = row_stride(dy, N, C, bad);
    p.dx = rows_of(dx, N, C, bad);
    if (dstream) {
        p.dstream = dstream->data();
        p.dstream_stride = row_stride(*dstream, N, C, bad);
    }
    auto kernel = VK_PICK(rms_norm_backward<T>);
    over_rows_summing(N, C, C, kBlockRows, threads, list_of(dweight, C, bad),
                      [&](int64_t begin, int64_t end, T* sums) { kernel(p, begin, end, sums); });
}

template <class T>
void layer_norm_forward(const Rows<T>& x, Dense<T>& weight, Dense<T>& bias, Dense<T>& y, Dense<T>& mean, Dense<T>& rstd,
                        double eps, int threads) {
    const char* bad = "layer_norm: expected x, y[N, C], weight, bias[C], mean, rstd[N]";
    require(x.ndim() == 2, bad);
    const int64_t N = x.shape(0), C = x.shape(1);
    LayerNorm<T> p{x.data(), list_of(weight, C, bad), list_of(bias, C, bad), row_stride(x, N, C, bad), C,
                   static_cast<T>(eps), rows_of(y, N, C, bad), list_of(mean, N, bad), list_of(rstd, N, bad)};
    auto kernel = VK_PICK(layer_norm_forward<T>);
    over_rows(N, C, threads, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

template <class T>
void layer_norm_backward(const Rows<T>& dy, const Rows<T>& x, Dense<T>& weight, Dense<T>& mean, Dense<T>& rstd,
                         Dense<T>& dx, Dense<T>& dweight, Dense<T>& dbias, int threads) {
    const char* bad = "layer_norm: expected dy, x, dx[N, C], weight, dweight, dbias[C], mean, rstd[N]";
    require(x.ndim() == 2, bad);
    const int64_t N = x.shape(0), C = x.shape(1);
    LayerNorm<T> p{x.data(), list_of(weight, C, bad), nullptr, row_stride(x, N, C, bad), C, T(0), nullptr,
                   list_of(mean, N, bad), list_of(rstd, N, bad)};
    p.dy = dy.data();
    p.dy_stride = row_stride(dy, N, C, bad);
    p.dx = rows_of(dx, N, C, bad);
    T *weights = list_of(dweight, C, bad), *biases = list_of(dbias, C, bad);
    std::vector<T> both(2 * C);
    auto kernel = VK_PICK(layer_norm_backward<T>);
    over_rows_summing(N, C, 2 * C, kBlockRows, threads, both.data(),
                      [&](int64_t begin, int64_t end, T* sums) { kernel(p, begin, end, sums, sums + C); });
    std::copy(both.begin(), both.begin() + C, weights);
    std::copy(both.begin() + C, both.end(), biases);
}

template <class T>
void norm_rope_forward(const Rows<T>& x, Dense<T>& weight, Dense<T>& cosine, Dense<T>& sine, Dense<T>& y,
                       Dense<T>& rstd, double eps, int threads) {
    const char* bad = "norm_rope: expected x, y[T, H, D] with D even, weight[D], cos, sin[T, D / 2], rstd[T * H]";
    require(x.ndim() == 3 && x.shape(2) % 2 == 0, bad);
    const int64_t N = x.shape(0), H = x.shape(1), D = x.shape(2);
    NormRope<T> p{x.data(), list_of(weight, D, bad), rows_of(cosine, N, D / 2, bad), rows_of(sine, N, D / 2, bad),
                  heads_stride(x, N, H, D, bad), H, D, static_cast<T>(eps),
                  heads_of(y, N, H, D, bad), list_of(rstd, N * H, bad)};
    auto kernel = VK_PICK(norm_rope_forward<T>);
    over_rows(N, H * D, threads, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

template <class T>
void norm_rope_backward(const Rows<T>& dy, const Rows<T>& x, Dense<T>& weight, Dense<T>& cosine, Dense<T>& sine,
                        Dense<T>& rstd, Dense<T>& dx, Dense<T>& dweight, int threads) {
    const char* bad = "norm_rope: expected dy, x, dx[T, H, D], weight, dweight[D], cos, sin[T, D / 2], rstd[T * H]";
    require(x.ndim() == 3 && x.shape(2) % 2 == 0, bad);
    const int64_t N = x.shape(0), H = x.shape(1), D = x.shape(2);
    NormRope<T> p{x.data(), list_of(weight, D, bad), rows_of(cosine, N, D / 2, bad), rows_of(sine, N, D / 2, bad),
                  heads_stride(x, N, H, D, bad), H, D, T(0), nullptr, list_of(rstd, N * H, bad)};
    p.dy = dy.data();
    p.dy_stride = heads_stride(dy, N, H, D, bad);
    p.dx = heads_of(dx, N, H, D, bad);
    auto kernel = VK_PICK(norm_rope_backward<T>);
    over_rows_summing(N, H * D, D, kBlockTokens, threads, list_of(dweight, D, bad),
                      [&](int64_t begin, int64_t end, T* sums) { kernel(p, begin, end, sums); });
}

template <class T>
void bind(py::module_& m) {
    const auto x = py::arg("x").noconvert(), dy = py::arg("dy").noconvert(), weight = py::arg("weight").noconvert(),
               bias = py::arg("bias").noconvert(), y = py::arg("y").noconvert(), mean = py::arg("mean").noconvert(),
               rstd = py::arg("rstd").noconvert(), dx = py::arg("dx").noconvert(),
               dweight = py::arg("dweight").noconvert(), dbias = py::arg("dbias").noconvert(),
               cosine = py::arg("cos").noconvert(), sine = py::arg("sin").noconvert();
    const auto eps = py::arg("eps"), threads = py::arg("threads");
    m.def("rms_norm_forward", &rms_norm_forward<T>, x, weight, eps, y, rstd, threads, "Writes y[N, C] and rstd[N].");
    m.def("rms_norm_backward", &rms_norm_backward<T>, dy, x, weight, rstd, dx, dweight,
          py::arg("dstream").noconvert().none(true), threads, "Writes dx[N, C], dstream added, and dweight[C].");
    m.def("layer_norm_forward", &layer_norm_forward<T>, x, weight, bias, y, mean, rstd, eps, threads,
          "Writes y[N, C], mean[N] and rstd[N].");
    m.def("layer_norm_backward", &layer_norm_backward<T>, dy, x, weight, mean, rstd, dx, dweight, dbias, threads,
          "Writes dx[N, C], dweight[C] and dbias[C].");
    m.def("norm_rope_forward", &norm_rope_forward<T>, x, weight, cosine, sine, y, rstd, eps, threads,
          "Writes y[T, H, D], the normed and rotated heads, and rstd[T * H].");
    m.def("norm_rope_backward", &norm_rope_backward<T>, dy, x, weight, cosine, sine, rstd, dx, dweight, threads,
          "Writes dx[T, H, D] and dweight[D].");
}

}  // namespace

void bind_rows_norms(py::module_& m) {
    bind<float>(m);
    bind<double>(m);
}
