// Packed (variable-length) attention on the host, forward and backward, float and double.
// Work is shared out by (document, key head), longest first; every sum has one order, so results do not depend on the
// number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "vkernels/host.h"

namespace {

template <class T>
struct Problem {
    const T *q, *k, *v;
    int64_t q_stride, k_stride, v_stride;  // elements from one row to the next
    const int32_t *kv_lo, *kv_hi;          // absolute rows of k, or null
    int64_t Tq, Hq, Hk, D;
    T scale;
    T *out, *lse;                                // forward writes both, backward reads lse
    const T *grad_out = nullptr, *saved_out = nullptr;
    T *dq = nullptr, *dk = nullptr, *dv = nullptr;
};

struct Piece {  // one document
    int64_t q0, queries, k0, keys;
};

#define VK_KERNELS "vkernels/attention_kernels.h"
#include "vkernels/foreach_isa.h"

std::vector<Piece> pieces_of(const Dense<int32_t>& cu_q, const Dense<int32_t>& cu_k, int64_t Tq, int64_t Tk) {
    require(cu_q.ndim() == 1 && cu_k.ndim() == 1 && cu_q.size() == cu_k.size() && cu_q.size() >= 1,
            "varlen_attention: cu_seqlens_q and cu_seqlens_k are not two lists of the same length");
    const int32_t *q = cu_q.data(), *k = cu_k.data();
    const int64_t S = cu_q.size() - 1;
    require(q[0] == 0 && k[0] == 0 && q[S] == Tq && k[S] == Tk,
            "varlen_attention: cu_seqlens does not run from 0 to the number of rows");
    std::vector<Piece> pieces;
    for (int64_t s = 0; s < S; ++s) {
        require(q[s] <= q[s + 1] && k[s] <= k[s + 1], "varlen_attention: cu_seqlens decreases");
        if (q[s + 1] > q[s] || k[s + 1] > k[s])
            pieces.push_back({q[s], q[s + 1] - q[s], k[s], k[s + 1] - k[s]});
    }
    std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
        return a.queries * a.keys > b.queries * b.keys;
    });
    return pieces;
}

// Rows of [T, H, D] whose heads are dense; the rows themselves may be apart (a slice of a merged projection).
template <class T>
int64_t row_stride(const py::array_t<T>& x, int64_t H, int64_t D) {
    require(x.ndim() == 3 && x.shape(1) == H && x.shape(2) == D, "varlen_attention: an operand is not [T, heads, D]");
    if (x.size() == 0) return 0;  // numpy gives empty arrays any strides
    const auto item = static_cast<py::ssize_t>(sizeof(T));
    require((D == 1 || x.strides(2) == item) && (H == 1 || x.strides(1) == D * item) && x.strides(0) % item == 0,
            "varlen_attention: the heads of a row are not contiguous");
    return x.strides(0) / item;
}

const int32_t* bound(const std::optional<Dense<int32_t>>& x, int64_t Tq) {
    if (!x) return nullptr;
    require(x->ndim() == 1 && x->size() == Tq, "varlen_attention: kv_lo or kv_hi is not int32[Tq]");
    return x->data();
}

template <class T>
Problem<T> problem_of(const py::array_t<T>& q, const py::array_t<T>& k, const py::array_t<T>& v,
                      const std::optional<Dense<int32_t>>& kv_lo, const std::optional<Dense<int32_t>>& kv_hi,
                      double scale, T* out, T* lse) {
    require(q.ndim() == 3 && k.ndim() == 3, "varlen_attention: an operand is not [T, heads, D]");
    const int64_t Tq = q.shape(0), Hq = q.shape(1), D = q.shape(2), Hk = k.shape(1);
    require(Hk > 0 && Hq % Hk == 0 && v.shape(0) == k.shape(0), "varlen_attention: heads or rows of k, v do not fit q");
    return {q.data(), k.data(), v.data(), row_stride(q, Hq, D), row_stride(k, Hk, D), row_stride(v, Hk, D),
            bound(kv_lo, Tq), bound(kv_hi, Tq), Tq, Hq, Hk, D, static_cast<T>(scale), out, lse};
}

template <class T>
void run(const Problem<T>& p, const std::vector<Piece>& pieces, int threads,
         void (*kernel)(const Problem<T>&, const Piece&, int64_t, Scratch<T>&)) {
    py::gil_scoped_release release;
    int64_t work = 0;
    for (const Piece& piece : pieces) work += piece.queries * piece.keys;
    if (work * p.Hq * p.D < (1 << 19)) threads = 1;  // starting a thread costs more
    std::vector<Scratch<T>> scratch(std::max(threads, 1));
    parallel_for(static_cast<int64_t>(pieces.size()) * p.Hk, threads, [&](int64_t item, int thread) {
        kernel(p, pieces[item / p.Hk], item % p.Hk, scratch[thread]);
    });
}

template <class T>
void forward(const py::array_t<T>& q, const py::array_t<T>& k, const py::array_t<T>& v, const Dense<int32_t>& cu_q,
             const Dense<int32_t>& cu_k, const std::optional<Dense<int32_t>>& kv_lo,
             const std::optional<Dense<int32_t>>& kv_hi, double scale, Dense<T>& out, Dense<T>& lse, int threads) {
    Problem<T> p = problem_of(q, k, v, kv_lo, kv_hi, scale, out.mutable_data(), lse.mutable_data());
    require(out.size() == q.size() && lse.size() == p.Hq * p.Tq, "varlen_attention: out or lse has another size");
    run<T>(p, pieces_of(cu_q, cu_k, p.Tq, k.shape(0)), threads, VK_PICK(forward_piece<T>));
}

template <class T>
void backward(const Dense<T>& grad_out, const py::array_t<T>& q, const py::array_t<T>& k, const py::array_t<T>& v,
              const Dense<T>& out, Dense<T>& lse, const Dense<int32_t>& cu_q, const Dense<int32_t>& cu_k,
              const std::optional<Dense<int32_t>>& kv_lo, const std::optional<Dense<int32_t>>& kv_hi, double scale,
              Dense<T>& dq, Dense<T>& dk, Dense<T>& dv, int threads) {
    Problem<T> p = problem_of(q, k, v, kv_lo, kv_hi, scale, static_cast<T*>(nullptr), lse.mutable_data());
    require(grad_out.size() == q.size() && out.size() == q.size() && dq.size() == q.size() && dk.size() == k.size() &&
                dv.size() == v.size() && lse.size() == p.Hq * p.Tq,
            "varlen_attention: a gradient has another size than its operand");
    p.grad_out = grad_out.data();
    p.saved_out = out.data();
    p.dq = dq.mutable_data();
    p.dk = dk.mutable_data();
    p.dv = dv.mutable_data();
    run<T>(p, pieces_of(cu_q, cu_k, p.Tq, k.shape(0)), threads, VK_PICK(backward_piece<T>));
}

template <class T>
void bind(py::module_& m) {
    m.def("attention_forward", &forward<T>, py::arg("q").noconvert(), py::arg("k").noconvert(), py::arg("v").noconvert(),
          py::arg("cu_q").noconvert(), py::arg("cu_k").noconvert(), py::arg("kv_lo").noconvert(), py::arg("kv_hi").noconvert(),
          py::arg("scale"), py::arg("out").noconvert(), py::arg("lse").noconvert(), py::arg("threads"),
          "Packed attention: q[Tq, Hq, D], k, v[Tk, Hk, D] -> writes out[Tq, Hq, D] and lse[Hq, Tq].");
    m.def("attention_backward", &backward<T>, py::arg("grad_out").noconvert(), py::arg("q").noconvert(),
          py::arg("k").noconvert(), py::arg("v").noconvert(), py::arg("out").noconvert(), py::arg("lse").noconvert(),
          py::arg("cu_q").noconvert(), py::arg("cu_k").noconvert(), py::arg("kv_lo").noconvert(), py::arg("kv_hi").noconvert(),
          py::arg("scale"), py::arg("dq").noconvert(), py::arg("dk").noconvert(), py::arg("dv").noconvert(),
          py::arg("threads"), "The gradients of attention_forward -> writes dq, dk, dv.");
}

}  // namespace

void bind_attention(py::module_& m) {
    bind<float>(m);
    bind<double>(m);
}
