// Sampling on the host: a row goes from logits to a token without being sorted.
#pragma GCC optimize("fp-contract=off")
#include <algorithm>
#include <limits>
#include <optional>

#include "common/sampling_math.h"
#include "vkernels/host.h"

namespace {

using namespace sampling;

struct Problem {
    const float *logits, *uncond;
    const bool* seen;
    int64_t logits_stride, uncond_stride, seen_stride, n;
    Setting setting;
    int64_t top_k;
    double top_p;
    bool greedy;
    const int64_t* keys;
    uint64_t seed, step;
    int64_t* ids;
    float* logprob;
};

// -> the scores of a row, and the highest; a score that is not below infinity makes that one infinity.
float write_scores(const Problem& p, int64_t row, float* x) {
    const float* logits = p.logits + row * p.logits_stride;
    std::copy(logits, logits + p.n, x);
    if (p.seen) {
        const bool* seen = p.seen + row * p.seen_stride;
        for (int64_t i = 0; i < p.n; ++i) x[i] = seen[i] ? p.setting.penalised(x[i]) : x[i];
    }
    if (p.uncond) {
        const float* u = p.uncond + row * p.uncond_stride;
        for (int64_t i = 0; i < p.n; ++i) x[i] = p.setting.guided(x[i], u[i]);
    }
    const float infinity = std::numeric_limits<float>::infinity();
    float peak = -infinity;
    for (int64_t i = 0; i < p.n; ++i) {
        x[i] = p.setting.tempered(x[i]);
        const float v = x[i] < infinity ? x[i] : infinity;
        peak = v > peak ? v : peak;
    }
    return peak;
}

// The highest score such that it and all higher ones have at least `target` together, where score i counts measure(i):
// the radix selection of a key in digits of 8 bits.
template <class Measure>
float select(const float* x, int64_t n, uint64_t target, const Measure& measure) {
    uint32_t prefix = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        uint64_t sums[256] = {};
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t key = key_of(x[i]);
            if (static_cast<uint64_t>(key) >> (shift + 8) == prefix) sums[key >> shift & 255] += measure(i);
        }
        uint32_t digit = 255;
        for (; digit && sums[digit] < target; --digit) target -= sums[digit];
        prefix = prefix << 8 | digit;
    }
    return float_of(prefix);
}

void sample_row(const Problem& p, int64_t row, Scratch<float>& score_memory, Scratch<uint64_t>& weight_memory) {
    float* x = score_memory.get(p.n);
    const float peak = write_scores(p, row, x);
    if (std::isinf(peak)) {
        p.ids[row] = 0;
        p.logprob[row] = std::numeric_limits<float>::quiet_NaN();
        return;
    }
    if (p.greedy) {
        p.ids[row] = std::find(x, x + p.n, peak) - x;
        p.logprob[row] = 0;
        return;
    }
    uint64_t* w = weight_memory.get(p.n);
    uint64_t total = 0;
    auto cut = [&](float least) {
        total = 0;
        for (int64_t i = 0; i < p.n; ++i) total += w[i] = x[i] >= least ? w[i] : 0;
    };
    for (int64_t i = 0; i < p.n; ++i) total += w[i] = weight(sub(x[i], peak));
    if (p.top_k > 0 && p.top_k < p.n) cut(select(x, p.n, p.top_k, [](int64_t) { return 1; }));
    if (p.top_p < 1) cut(select(x, p.n, share(total, p.top_p), [&](int64_t i) { return w[i]; }));
    const uint64_t random = philox(p.seed, p.step, p.keys ? p.keys[row] : row);
    uint64_t target = static_cast<unsigned __int128>(total) * random >> 64;
    int64_t at = 0;
    for (; target >= w[at]; ++at) target -= w[at];
    p.ids[row] = at;
    p.logprob[row] = static_cast<float>(std::log(static_cast<double>(w[at]) / static_cast<double>(total)));
}

// The distance of the rows of [R, n], whose elements lie side by side.
template <class T>
int64_t row_stride(const py::array_t<T>& x, int64_t R, int64_t n, const char* what) {
    require(x.ndim() == 2 && x.shape(0) == R && x.shape(1) == n, what);
    require(n == 1 || R == 0 || x.strides(1) == static_cast<py::ssize_t>(sizeof(T)), what);
    return x.strides(0) / static_cast<py::ssize_t>(sizeof(T));
}

void sample(const py::array_t<float>& logits, const std::optional<py::array_t<float>>& uncond,
            const std::optional<py::array_t<bool>>& seen, const std::optional<Dense<int64_t>>& keys, int64_t seed,
            int64_t step, std::tuple<float, float, float, float> setting, int64_t top_k, double top_p, bool greedy,
            Dense<int64_t>& ids, Dense<float>& logprob, int threads) {
    const char* bad = "sample_logits: expected logits, uncond, seen[R, n] with n > 0, and keys, ids, logprob[R]";
    require(logits.ndim() == 2 && logits.shape(1) > 0, bad);
    const int64_t R = logits.shape(0), n = logits.shape(1);
    require(ids.ndim() == 1 && ids.size() == R && logprob.ndim() == 1 && logprob.size() == R, bad);
    require(!keys || (keys->ndim() == 1 && keys->size() == R), bad);
    const auto [guidance, penalty, inverse_penalty, inverse_temperature] = setting;
    const Problem p{logits.data(),
                    uncond ? uncond->data() : nullptr,
                    seen ? seen->data() : nullptr,
                    row_stride(logits, R, n, bad),
                    uncond ? row_stride(*uncond, R, n, bad) : 0,
                    seen ? row_stride(*seen, R, n, bad) : 0,
                    n,
                    {guidance, penalty, inverse_penalty, inverse_temperature},
                    top_k,
                    top_p,
                    greedy,
                    keys ? keys->data() : nullptr,
                    static_cast<uint64_t>(seed),
                    static_cast<uint64_t>(step),
                    ids.mutable_data(),
                    logprob.mutable_data()};
    py::gil_scoped_release release;
    if (R * n < (1 << 15)) threads = 1;  // starting a thread costs more
    std::vector<Scratch<float>> scores(std::max(threads, 1));
    std::vector<Scratch<uint64_t>> weights(std::max(threads, 1));
    parallel_for(R, threads, [&](int64_t row, int thread) { sample_row(p, row, scores[thread], weights[thread]); });
}

}  // namespace

void bind_sampling(py::module_& m) {
    m.def("sample_logits", &sample, py::arg("logits").noconvert(), py::arg("uncond").noconvert(),
          py::arg("seen").noconvert(), py::arg("keys").noconvert(), py::arg("seed"), py::arg("step"),
          py::arg("setting"), py::arg("top_k"), py::arg("top_p"), py::arg("greedy"), py::arg("ids").noconvert(),
          py::arg("logprob").noconvert(), py::arg("threads"),
          "Draws a column of each row of logits[R, n]: writes ids[R] and logprob[R]. setting: guidance, penalty, "
          "1 / penalty, 1 / temperature.");
}
