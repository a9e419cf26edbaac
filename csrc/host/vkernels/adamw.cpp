// AdamW over lists of tensors in one pass on the CPU, and the sum of their squares. Tensors come as addresses, which the
// Python side takes from tensors whose sizes it has checked: a numpy view of each would cost more than a small update.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "vkernels/host.h"

namespace {

constexpr int kFloat = 0, kBf16 = 1;  // kinds of elements
constexpr int64_t kBlock = 512;       // elements that stay in the first-level cache between the steps of the work

struct AdamW {  // one step
    int grad_kind, avg_kind, square_kind;
    uint32_t step;
    uint64_t seed;
    double lr, beta1, beta2;
    float scale, size, root, eps;
};

struct AdamWTensor {
    void *p, *g, *m, *v, *c;  // c may be null
    uint32_t index;
    double decay;
};

#define VK_KERNELS "vkernels/adamw_kernels.h"
#include "vkernels/foreach_isa.h"

constexpr int64_t kChunk = 1 << 15;  // elements of one tensor that a thread takes at a time
constexpr int64_t kWorthThreads = 1 << 21;  // 1.5 ms of work: a thread starts in 0.1 ms, on a busy machine in several

struct Piece {
    int64_t tensor, begin, end;
};

std::vector<Piece> pieces_of(const int64_t* numels, int64_t n) {
    std::vector<Piece> pieces;
    for (int64_t t = 0; t < n; ++t)
        for (int64_t i = 0; i < numels[t]; i += kChunk) pieces.push_back({t, i, std::min(numels[t], i + kChunk)});
    return pieces;
}

template <class Work>
void over_pieces(const std::vector<Piece>& pieces, int threads, const Work& work) {
    int64_t elements = 0;
    for (const Piece& p : pieces) elements += p.end - p.begin;
    parallel_for(static_cast<int64_t>(pieces.size()), elements < kWorthThreads ? 1 : threads,
                 [&](int64_t i, int) { work(pieces[i], i); });
}

using Numbers = Dense<int64_t>;

void* at(const Numbers& pointers, int64_t tensor) {
    return pointers.size() ? reinterpret_cast<void*>(pointers.data()[tensor]) : nullptr;
}

// tables: numels, then the pointers of params, grads, exp_avgs, exp_avg_sqs and copies (these may be none).
void adamw_step(const std::vector<Numbers>& tables, const std::vector<int>& kinds, const Dense<double>& decays,
                int64_t step, double lr, double beta1, double beta2, double eps, double scale, bool kept,
                bool zero_grads, uint64_t seed, int threads) {
    require(tables.size() == 6 && kinds.size() == 3, "adamw_step: expected 6 tables and 3 kinds");
    const int64_t n = tables[0].size();
    for (int i = 1; i < 6; ++i)
        require(tables[i].size() == n || (i == 5 && tables[i].size() == 0), "adamw_step: the tables differ in length");
    require(decays.size() == n, "adamw_step: expected a weight decay for each tensor");
    for (int kind : kinds) require(kind == kFloat || kind == kBf16, "adamw_step: expected kinds 0 (float32) or 1 (bf16)");
    const double t = static_cast<double>(step) + 1;
    const AdamW s{kinds[0],
                  kinds[1],
                  kinds[2],
                  static_cast<uint32_t>(step),
                  seed,
                  lr,
                  beta1,
                  beta2,
                  static_cast<float>(scale),
                  static_cast<float>(lr / (1 - std::pow(beta1, t))),
                  static_cast<float>(std::sqrt(1 - std::pow(beta2, t))),
                  static_cast<float>(eps)};
    const auto run = VK_PICK(adamw_run);
    const int64_t width = s.grad_kind == kFloat ? 4 : 2;
    py::gil_scoped_release release;
    over_pieces(pieces_of(tables[0].data(), n), threads, [&](const Piece& piece, int64_t) {
        const int64_t i = piece.tensor;
        const AdamWTensor tensor{at(tables[1], i), at(tables[2], i), at(tables[3], i), at(tables[4], i),
                                 at(tables[5], i), static_cast<uint32_t>(i), decays.data()[i]};
        if (kept) run(s, tensor, piece.begin, piece.end);
        if (zero_grads) std::memset(static_cast<char*>(tensor.g) + piece.begin * width, 0, (piece.end - piece.begin) * width);
    });
}

double square_sum(const Numbers& numels, const Numbers& pointers, int kind, int threads) {
    require(numels.size() == pointers.size(), "square_sum: expected a pointer for each tensor");
    require(kind == kFloat || kind == kBf16, "square_sum: expected kind 0 (float32) or 1 (bf16)");
    const auto run = VK_PICK(squares_run);
    py::gil_scoped_release release;
    const std::vector<Piece> pieces = pieces_of(numels.data(), numels.size());
    std::vector<double> sums(pieces.size());
    over_pieces(pieces, threads, [&](const Piece& piece, int64_t i) {
        sums[i] = run(at(pointers, piece.tensor), kind, piece.begin, piece.end);
    });
    double sum = 0;
    for (double s : sums) sum += s;
    return sum;
}

}  // namespace

void bind_adamw(py::module_& m) {
    m.def("adamw_step", &adamw_step, py::arg("tables"), py::arg("kinds"), py::arg("decays").noconvert(), py::arg("step"),
          py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("scale"), py::arg("kept"),
          py::arg("zero_grads"), py::arg("seed"), py::arg("threads"), "One AdamW update of the tensors at these addresses.");
    m.def("square_sum", &square_sum, py::arg("numels").noconvert(), py::arg("pointers").noconvert(), py::arg("kind"),
          py::arg("threads"), "The sum of squares of the tensors at these addresses.");
}
