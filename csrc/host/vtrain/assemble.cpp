// Whole packed batches from pieces of documents: where every piece goes, what is a label and what it weighs.
// Rows are numbered over all bins of a step: bin a of T tokens has the rows a*T .. a*T+T-1 of flat arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

template <typename T>
using In = py::array_t<T, py::array::c_style>;
template <typename T>
using Out = py::array_t<T, py::array::c_style>;

constexpr int32_t kIgnore = -100;  // batch.IGNORE
constexpr int32_t kStored = -2;    // compose.STORED: the ids of a sample
constexpr int32_t kSlot = -1;      // compose.SLOT: rows of its features
constexpr int64_t kClassRows = 512;

void require(bool holds, const char* what) {
    if (!holds) throw py::value_error(std::string("assemble: ") + what);
}

template <typename T>
int64_t flat(const py::array_t<T, py::array::c_style>& a) {
    return static_cast<int64_t>(a.size());
}

struct Span {
    int64_t sample, start, count, row, document;
};

py::array_t<int64_t> as_columns(const std::vector<Span>& spans) {
    const auto n = static_cast<py::ssize_t>(spans.size());
    py::array_t<int64_t> out({py::ssize_t{5}, n});
    int64_t* o = out.mutable_data();
    for (py::ssize_t i = 0; i < n; ++i) {
        const Span& s = spans[i];
        o[i] = s.sample, o[n + i] = s.start, o[2 * n + i] = s.count, o[3 * n + i] = s.row, o[4 * n + i] = s.document;
    }
    return out;
}

// Where documents lie that are laid end to end in their bins: writes cu [A, S+1] (its tail is T) and -1 into what the
// bins leave free of ids [A, T]. Gives the first flat row of each document and the tokens of each bin.
py::tuple lay_documents(In<int64_t> lengths, In<int64_t> documents, Out<int32_t> cu, Out<int32_t> ids) {
    require(cu.ndim() == 2 && ids.ndim() == 2, "cu and ids of two dimensions");
    const int64_t bins = flat(documents), n = flat(lengths), S = cu.shape(1) - 1, T = ids.shape(1);
    require(cu.shape(0) == bins && ids.shape(0) == bins && S >= 0 && T <= INT32_MAX, "a row of cu and of ids per bin");
    py::array_t<int64_t> rows(n), tokens(bins);
    int64_t *row = rows.mutable_data(), *filled = tokens.mutable_data();
    int32_t *bound = cu.mutable_data(), *id = ids.mutable_data();
    const int64_t *length = lengths.data(), *count = documents.data();
    int64_t d = 0;
    for (int64_t a = 0; a < bins; ++a, bound += S + 1, id += T) {
        require(0 <= count[a] && count[a] <= S && count[a] <= n - d, "as many documents as the bins hold");
        int64_t at = 0;
        bound[0] = 0;
        for (int64_t i = 0; i < count[a]; ++i, ++d) {
            require(0 <= length[d] && length[d] <= T - at, "documents that fit their bin");
            row[d] = a * T + at;
            at += length[d];
            bound[i + 1] = static_cast<int32_t>(at);
        }
        std::fill(bound + count[a] + 1, bound + S + 1, static_cast<int32_t>(T));
        std::fill(id + at, id + T, -1);
        filled[a] = at;
    }
    require(d == n, "as many documents as the bins hold");
    return py::make_tuple(rows, tokens);
}

// Cuts documents, [first, first + take) of each, out of their pieces and lays them at their rows. Literals and weights
// are written here; what must be read comes back as spans.
py::tuple lay_pieces(In<int64_t> cu, In<int64_t> sample, In<int32_t> start, In<int32_t> count, In<int32_t> token,
                     In<float> weight, In<int64_t> first, In<int64_t> take, In<int64_t> at, bool stored_labels,
                     Out<int32_t> ids, Out<float> target) {
    const int64_t n = flat(at), m = flat(sample), rows = flat(ids);
    require(flat(cu) == n + 1 && flat(first) == n && flat(take) == n, "one cu, first, take and row per document");
    require(flat(start) == m && flat(count) == m && flat(token) == m && flat(weight) == m, "pieces of uneven columns");
    require(flat(target) == rows, "ids and target of one size");
    std::vector<Span> spans, slots;
    std::vector<uint8_t> by_runs;
    const int64_t *c = cu.data(), *s = sample.data(), *f = first.data(), *t = take.data(), *a = at.data();
    const int32_t *b = start.data(), *k = count.data(), *id = token.data();
    const float* w = weight.data();
    int32_t* out = ids.mutable_data();
    float* goal = target.mutable_data();
    std::string problem;
    {
        py::gil_scoped_release release;
        spans.reserve(m), by_runs.reserve(m);
        for (int64_t d = 0; d < n && problem.empty(); ++d) {
            if (c[d] < 0 || c[d] > c[d + 1] || c[d + 1] > m || f[d] < 0 || t[d] < 0 || a[d] < 0 || t[d] > rows ||
                a[d] > rows - t[d]) {
                problem = "document " + std::to_string(d) + " lies outside its pieces or its rows";
                break;
            }
            int64_t skip = f[d], left = t[d], row = a[d];
            for (int64_t p = c[d]; p < c[d + 1] && left > 0; ++p) {
                if (k[p] < 0 || b[p] < 0) {
                    problem = "a piece of document " + std::to_string(d) + " has a negative start or count";
                    break;
                }
                const int64_t skipped = std::min<int64_t>(skip, k[p]);
                const int64_t length = std::min<int64_t>(k[p] - skipped, left);
                skip -= skipped;
                if (length == 0) continue;
                const bool stored = id[p] == kStored, runs = stored && std::isnan(w[p]);
                const float own = stored || !stored_labels ? w[p] : 0.0f;  // only stored ids have stored labels
                std::fill(goal + row, goal + row + length, runs ? 1.0f : own);
                if (stored) {
                    spans.push_back({s[p], b[p] + skipped, length, row, d});
                    by_runs.push_back(runs);
                } else {
                    if (id[p] == kSlot) slots.push_back({s[p], b[p] + skipped, length, row, d});
                    std::fill(out + row, out + row + length, id[p]);
                }
                row += length, left -= length;
            }
            if (problem.empty() && left > 0) problem = "document " + std::to_string(d) + " is shorter than its rows";
        }
    }
    if (!problem.empty()) throw py::value_error("assemble: " + problem);
    py::array_t<bool> flags(static_cast<py::ssize_t>(by_runs.size()));
    std::copy(by_runs.begin(), by_runs.end(), flags.mutable_data());
    return py::make_tuple(as_columns(spans), flags, as_columns(slots));
}

// The weights of spans from the loss runs of their samples (length | class << 24); no runs = what stands there.
void spread_runs(In<uint32_t> runs, In<int64_t> run_cu, In<int64_t> start, In<int64_t> count, In<int64_t> row,
                 In<float> class_weights, Out<float> target) {
    const int64_t n = flat(row), total = flat(runs), rows = flat(target);
    require(flat(run_cu) == n + 1 && flat(start) == n && flat(count) == n, "one row of runs per span");
    require(flat(class_weights) == 256, "256 loss classes");
    const uint32_t* r = runs.data();
    const int64_t *c = run_cu.data(), *b = start.data(), *k = count.data(), *a = row.data();
    const float* w = class_weights.data();
    float* goal = target.mutable_data();
    bool good = true;
    {
        py::gil_scoped_release release;
        for (int64_t i = 0; i < n && good; ++i) {
            good = c[i] >= 0 && c[i] <= c[i + 1] && c[i + 1] <= total && b[i] >= 0 && k[i] >= 0 && k[i] <= rows &&
                   a[i] >= 0 && a[i] <= rows - k[i];
            if (!good) break;
            int64_t at = 0;  // tokens of the sample before this run
            for (int64_t j = c[i]; j < c[i + 1] && at < b[i] + k[i]; ++j) {
                const int64_t end = at + (r[j] & 0xFFFFFFu);
                const int64_t low = std::max(at, b[i]), high = std::min(end, b[i] + k[i]);
                if (high > low) std::fill(goal + a[i] + (low - b[i]), goal + a[i] + (high - b[i]), w[r[j] >> 24]);
                at = end;
            }
        }
    }
    require(good, "a span lies outside its runs or its rows");
}

// Whether ids lie in -1..size-1 (slot rows are -1).
inline __attribute__((always_inline)) bool inside_loop(const int32_t* ids, int64_t n, int32_t size) {
    int32_t low = -1, high = -1;
    for (int64_t i = 0; i < n; ++i) {
        low = ids[i] < low ? ids[i] : low;
        high = ids[i] > high ? ids[i] : high;
    }
    return low == -1 && high < size;
}

struct Scored {
    int32_t labels, odd;  // odd: some weigh other than 1
};

// label[i] = id[i] weighing goal[i] where both count. Runs in place: weight may be goal, or lie one element before it,
// and label may be id; an element is never read after its place was written, hence ivdep.
inline __attribute__((always_inline)) Scored label_loop(const int32_t* id, const float* goal, int32_t* label,
                                                        float* weight, int64_t n) {
    int32_t labels = 0, odd = 0;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
        const int32_t token = id[i];
        const float w = goal[i];
        const int32_t counts = (token >= 0) & (w > 0.0f);
        label[i] = counts ? token : kIgnore;
        weight[i] = counts ? w : 0.0f;
        labels += counts;
        odd += counts & (w != 1.0f);
    }
    return {labels, odd};
}

inline __attribute__((always_inline)) int32_t count_loop(const int32_t* label, int32_t base, int64_t n) {
    int32_t found = 0;
    for (int64_t i = 0; i < n; ++i) found += label[i] >= base;
    return found;
}

inline __attribute__((always_inline)) void ramp_loop(int32_t* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<int32_t>(i);
}

// The same loops for the baseline and for AVX2, chosen at run time.
struct Loops {
    bool (*inside)(const int32_t*, int64_t, int32_t);
    Scored (*label)(const int32_t*, const float*, int32_t*, float*, int64_t);
    int32_t (*count)(const int32_t*, int32_t, int64_t);
    void (*ramp)(int32_t*, int64_t);
};

const Loops kPortable = {
    [](const int32_t* ids, int64_t n, int32_t size) { return inside_loop(ids, n, size); },
    [](const int32_t* id, const float* goal, int32_t* label, float* weight, int64_t n) {
        return label_loop(id, goal, label, weight, n);
    },
    [](const int32_t* label, int32_t base, int64_t n) { return count_loop(label, base, n); },
    [](int32_t* out, int64_t n) { ramp_loop(out, n); },
};

#if defined(__x86_64__)
#define VTRAIN_AVX2 __attribute__((target("avx2")))
VTRAIN_AVX2 bool inside_avx2(const int32_t* ids, int64_t n, int32_t size) { return inside_loop(ids, n, size); }
VTRAIN_AVX2 Scored label_avx2(const int32_t* id, const float* goal, int32_t* label, float* weight, int64_t n) {
    return label_loop(id, goal, label, weight, n);
}
VTRAIN_AVX2 int32_t count_avx2(const int32_t* label, int32_t base, int64_t n) { return count_loop(label, base, n); }
VTRAIN_AVX2 void ramp_avx2(int32_t* out, int64_t n) { ramp_loop(out, n); }
const Loops kAvx2 = {inside_avx2, label_avx2, count_avx2, ramp_avx2};
#endif

const Loops& loops_of(bool portable) {
#if defined(__x86_64__)
    if (!portable && __builtin_cpu_supports("avx2")) return kAvx2;
#endif
    (void)portable;
    return kPortable;
}

// One bin. weights holds what tokens weigh as targets, and what labels weigh afterwards.
struct Bin {
    int32_t *ids, *labels, *positions;
    float* weights;
    const int32_t* cu;
    const uint8_t* stored_labels;  // per document: its labels stand in place already, row by row
    int64_t documents, rows;
};

struct Vocab {
    const int32_t* bases;
    int64_t ranges;
    int32_t size;
};

// Fills a bin and adds its labels' weights to counts[ranges]. The document with an id outside the vocabulary, or -1.
int64_t finish_bin(const Bin& bin, const Vocab& vocab, const Loops& run, double* counts, int64_t& scored, bool& odd) {
    for (int64_t d = 0; d < bin.documents; ++d) {
        const int64_t start = bin.cu[d], n = bin.cu[d + 1] - start;
        if (n == 0) continue;
        const int32_t* ids = bin.ids + start;
        int32_t* labels = bin.labels + start;
        float* weights = bin.weights + start;
        Scored found;
        if (bin.stored_labels[d]) {
            found = run.label(labels, weights, labels, weights, n);
        } else {  // nothing predicts the first token, and the last predicts nothing
            found = run.label(ids + 1, weights + 1, labels, weights, n - 1);
            labels[n - 1] = kIgnore;
            weights[n - 1] = 0.0f;
        }
        if (!run.inside(ids, n, vocab.size)) return d;
        if (bin.stored_labels[d] && run.count(labels, vocab.size, n)) return d;
        run.ramp(bin.positions + start, n);
        scored += found.labels;
        odd |= found.odd > 0;
        if (found.odd) {
            for (int64_t i = 0; i < n; ++i) {
                if (labels[i] < 0) continue;
                counts[std::upper_bound(vocab.bases, vocab.bases + vocab.ranges, labels[i]) - vocab.bases - 1] +=
                    static_cast<double>(weights[i]);
            }
        } else {  // whole numbers, from how many labels lie at or above each base
            int64_t above = found.labels;
            for (int64_t r = 0; r < vocab.ranges; ++r) {
                const int64_t next = r + 1 < vocab.ranges ? run.count(labels, vocab.bases[r + 1], n) : 0;
                counts[r] += static_cast<double>(above - next);
                above = next;
            }
        }
    }
    const int64_t tail = bin.cu[bin.documents];
    std::fill(bin.ids + tail, bin.ids + bin.rows, -1);
    std::fill(bin.labels + tail, bin.labels + bin.rows, kIgnore);
    std::fill(bin.weights + tail, bin.weights + bin.rows, 0.0f);
    run.ramp(bin.positions + tail, bin.rows - tail);
    return -1;
}

// Labels, weights, positions and padding of A bins whose ids, weights as targets and cu_seqlens stand in place.
py::tuple finish_bins(Out<int32_t> ids, Out<float> weights, Out<int32_t> labels, Out<int32_t> positions,
                      In<int32_t> cu, In<int64_t> documents, In<uint8_t> stored_labels, In<int32_t> bases, int32_t size,
                      bool portable) {
    const int64_t bins = flat(documents), ranges = flat(bases), total = flat(stored_labels);
    require(bins > 0 ? flat(ids) % bins == 0 && flat(cu) % bins == 0 : flat(ids) == 0, "whole bins");
    require(flat(weights) == flat(ids) && flat(labels) == flat(ids) && flat(positions) == flat(ids),
            "ids, weights, labels and positions of one size");
    require(ranges > 0 && bases.data()[0] == 0 && size > 0, "a vocabulary that starts at 0");
    const int64_t rows = bins ? flat(ids) / bins : 0, bounds = bins ? flat(cu) / bins : 0;
    int64_t seen = 0;
    for (int64_t b = 0; b < bins; ++b) {
        const int64_t n = documents.data()[b];
        const int32_t* c = cu.data() + b * bounds;
        require(n >= 0 && n < bounds && n <= total - seen && c[0] == 0, "documents within cu_seqlens");
        for (int64_t d = 0; d < n; ++d) require(c[d] <= c[d + 1] && c[d + 1] <= rows, "cu_seqlens that rise");
        seen += n;
    }
    require(seen == total, "one flag per document");
    py::array_t<double> counts({bins, ranges});
    py::array_t<int64_t> scored(bins);
    py::array_t<bool> odd(bins);
    std::fill(counts.mutable_data(), counts.mutable_data() + counts.size(), 0.0);
    const Vocab vocab{bases.data(), ranges, size};
    const Loops& run = loops_of(portable);
    int32_t *i = ids.mutable_data(), *l = labels.mutable_data(), *p = positions.mutable_data();
    float* w = weights.mutable_data();
    double* sums = counts.mutable_data();
    int64_t *scored_of = scored.mutable_data(), bad = -1;
    bool* odd_of = odd.mutable_data();
    const int64_t* per_bin = documents.data();
    const int32_t* c = cu.data();
    const uint8_t* own = stored_labels.data();
    {
        py::gil_scoped_release release;
        int64_t first = 0;
        for (int64_t b = 0; b < bins && bad < 0; ++b) {
            const int64_t at = b * rows;
            const Bin bin{i + at, l + at, p + at, w + at, c + b * bounds, own + first, per_bin[b], rows};
            scored_of[b] = 0, odd_of[b] = false;
            const int64_t wrong = finish_bin(bin, vocab, run, sums + b * ranges, scored_of[b], odd_of[b]);
            if (wrong >= 0) bad = first + wrong;
            first += per_bin[b];
        }
    }
    return py::make_tuple(bad, counts, scored, odd);
}

// Rows by the vocabulary range of their label, in row order; every group is padded to whole blocks of 512 with `rows`.
void rows_by_class(In<int32_t> labels, int64_t rows, In<int32_t> bases, Out<int32_t> out, Out<int32_t> cu) {
    const int64_t ranges = flat(bases);
    require(rows > 0 && rows < INT32_MAX && flat(labels) % rows == 0, "whole bins of labels");
    const int64_t bins = flat(labels) / rows;
    require(ranges > 0 && flat(cu) == bins * (ranges + 1), "a cu per bin");
    const int64_t room = bins ? flat(out) / bins : 0;
    require(flat(out) == bins * room && (bins == 0 || room >= rows + ranges * (kClassRows - 1)), "room for padded groups");
    const int32_t *label = labels.data(), *base = bases.data();
    int32_t *o = out.mutable_data(), *c = cu.mutable_data();
    py::gil_scoped_release release;
    std::vector<int64_t> at(ranges);
    for (int64_t b = 0; b < bins; ++b, label += rows, o += room, c += ranges + 1) {
        auto class_of = [&](int32_t id) { return std::upper_bound(base, base + ranges, id) - base - 1; };
        std::fill(at.begin(), at.end(), 0);
        for (int64_t i = 0; i < rows; ++i)
            if (label[i] >= 0) ++at[class_of(label[i])];
        c[0] = 0;
        for (int64_t r = 0; r < ranges; ++r) {
            c[r + 1] = static_cast<int32_t>(c[r] + (at[r] + kClassRows - 1) / kClassRows * kClassRows);
            at[r] = c[r];
        }
        std::fill(o, o + room, static_cast<int32_t>(rows));
        for (int64_t i = 0; i < rows; ++i)
            if (label[i] >= 0) o[at[class_of(label[i])]++] = static_cast<int32_t>(i);
    }
}

}  // namespace

void bind_assemble(py::module_& m) {
    m.def("lay_documents", &lay_documents, py::arg("lengths"), py::arg("documents"), py::arg("cu").noconvert(),
          py::arg("ids").noconvert(),
          "Write cu int32[A,S+1] of documents laid end to end in A bins, and -1 behind them into ids int32[A,T]; "
          "(first flat row int64[D] of each document, tokens int64[A]).");
    m.def("lay_pieces", &lay_pieces, py::arg("cu"), py::arg("sample"), py::arg("start"), py::arg("count"),
          py::arg("token"), py::arg("weight"), py::arg("first"), py::arg("take"), py::arg("row"),
          py::arg("stored_labels"), py::arg("ids").noconvert(), py::arg("target").noconvert(),
          "Lays cut documents at their rows -> (spans i64[5, k]: sample, start, count, row, document; whether a span's "
          "weights come from loss runs bool[k]; slots i64[5, s]: the same of slot rows).");
    m.def("spread_runs", &spread_runs, py::arg("runs"), py::arg("run_cu"), py::arg("start"), py::arg("count"),
          py::arg("row"), py::arg("class_weights"), py::arg("target").noconvert(),
          "Writes the weights of spans from the loss runs of their samples.");
    m.def("finish_bins", &finish_bins, py::arg("ids").noconvert(), py::arg("weights").noconvert(),
          py::arg("labels").noconvert(), py::arg("positions").noconvert(), py::arg("cu"), py::arg("documents"),
          py::arg("stored_labels"), py::arg("bases"), py::arg("size"), py::arg("portable") = false,
          "Labels, weights, positions and padding of bins -> (a document with an id outside the vocabulary or -1, label "
          "weights per vocabulary range f64[A, R], labels i64[A], any weight other than 1 bool[A]).");
    m.def("rows_by_class", &rows_by_class, py::arg("labels"), py::arg("rows"), py::arg("bases"),
          py::arg("out").noconvert(), py::arg("cu").noconvert(),
          "Rows of every bin grouped by the vocabulary range of their label, groups padded to 512 with `rows`.");
}
