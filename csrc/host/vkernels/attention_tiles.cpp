// The work list of packed attention: which keys a tile of queries reads, which queries read a tile of keys.
// The layout of a row is told in vkernels/tiles.py; vkernels/jit/attention_tiles.py makes the same list on a GPU.
#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>

#include "vkernels/host.h"

namespace {

constexpr int64_t kWidth = 8;  // int32 per tile
constexpr int32_t kNone = std::numeric_limits<int32_t>::max();

struct Blocks {
    int64_t q, k, step;  // rows of a tile of queries, of a tile of keys, and of the unit that ranges of queries come in
};

struct Document {
    int32_t q0, q1, k0, k1;
};

// What the rows of a step or tile see together: none of them anything outside [lo, hi), all of them [full_lo, full_hi).
struct Seen {
    int32_t lo = kNone, hi = -kNone, full_lo = -kNone, full_hi = kNone;

    void row(int32_t first, int32_t end) {
        if (first < end) {
            lo = std::min(lo, first);
            hi = std::max(hi, end);
        }
        full_lo = std::max(full_lo, first);
        full_hi = std::min(full_hi, end);
    }
    void join(const Seen& other) {
        lo = std::min(lo, other.lo);
        hi = std::max(hi, other.hi);
        full_lo = std::max(full_lo, other.full_lo);
        full_hi = std::min(full_hi, other.full_hi);
    }
};

struct Lists {
    const int32_t *kv_lo, *kv_hi;  // or null
    Blocks blocks;
    std::vector<int32_t> q, k;  // kWidth per tile
    std::vector<Seen> steps;    // of one document

    void add(const Document& d) {
        const int32_t shift = d.k1 - d.q1 + 1;  // row i sees keys below i + shift
        steps.clear();
        for (int64_t i = d.q0; i < d.q1; i += blocks.step) {
            Seen seen;
            for (int64_t row = i; row < std::min<int64_t>(i + blocks.step, d.q1); ++row)
                seen.row(kv_lo ? std::max(d.k0, kv_lo[row]) : d.k0,
                         kv_hi ? std::min(d.k1, kv_hi[row]) : static_cast<int32_t>(row) + shift);
            steps.push_back(seen);
        }
        for (int64_t i = d.q0; i < d.q1; i += blocks.q) add_queries(d, i, shift);
        for (int64_t j = d.k0; j < d.k1; j += blocks.k) add_keys(d, j, shift);
    }

    void add_queries(const Document& d, int64_t q0, int32_t shift) {
        const int64_t q1 = std::min<int64_t>(q0 + blocks.q, d.q1);
        Seen seen;
        for (int64_t s = (q0 - d.q0) / blocks.step; s * blocks.step < q1 - d.q0; ++s) seen.join(steps[s]);
        if (seen.lo == kNone) seen.lo = seen.hi = d.k0;  // no row sees anything
        if (seen.full_hi <= seen.full_lo) seen.full_lo = seen.full_hi = seen.lo;
        const int32_t row[kWidth] = {static_cast<int32_t>(q0), static_cast<int32_t>(q1), seen.lo, seen.full_lo,
                                     seen.full_hi, seen.hi, shift, 0};
        q.insert(q.end(), row, row + kWidth);
    }

    // Steps whose rows all see all keys count as full where they lie side by side; else every step is masked.
    void add_keys(const Document& d, int64_t k0, int32_t shift) {
        const int64_t k1 = std::min<int64_t>(k0 + blocks.k, d.k1), count = static_cast<int64_t>(steps.size());
        int64_t first = count, last = -1, full_first = count, full_last = -1, full = 0;
        for (int64_t s = 0; s < count; ++s) {
            const Seen& seen = steps[s];
            if (seen.lo >= k1 || seen.hi <= k0) continue;
            first = std::min(first, s);
            last = s;
            const bool whole = d.q0 + (s + 1) * blocks.step <= d.q1;
            if (whole && seen.full_lo <= k0 && seen.full_hi >= k1) {
                full_first = std::min(full_first, s);
                full_last = s;
                ++full;
            }
        }
        if (last < 0) first = 0;
        if (full == 0 || full != full_last - full_first + 1) {
            full_first = first;
            full_last = first - 1;
        }
        const auto at = [&](int64_t s) { return static_cast<int32_t>(std::min(d.q0 + s * blocks.step, int64_t{d.q1})); };
        const int32_t row[kWidth] = {static_cast<int32_t>(k0), static_cast<int32_t>(k1), at(first), at(full_first),
                                     at(full_last + 1), at(last + 1), shift, 0};
        k.insert(k.end(), row, row + kWidth);
    }
};

// The longest range of fields [2, 5) first; equal ones stay in order.
void write_longest_first(const std::vector<int32_t>& tiles, int32_t* out) {
    const auto length = [&](int64_t i) { return tiles[i * kWidth + 5] - tiles[i * kWidth + 2]; };
    std::vector<int64_t> order(tiles.size() / kWidth);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length(a) > length(b); });
    for (int64_t i : order) out = std::copy_n(tiles.data() + i * kWidth, kWidth, out);
}

const int32_t* bounds(const std::optional<Dense<int32_t>>& x, int32_t rows) {
    if (!x) return nullptr;
    require(x->ndim() == 1 && x->size() == rows, "attention_tiles: kv_lo or kv_hi is not one int32 per query");
    return x->data();
}

std::vector<Document> documents(const Dense<int32_t>& cu_q, const Dense<int32_t>& cu_k) {
    require(cu_q.ndim() == 1 && cu_k.ndim() == 1 && cu_q.size() == cu_k.size() && cu_q.size() >= 1,
            "attention_tiles: cu_seqlens_q and cu_seqlens_k are not two lists of the same length");
    const int32_t *q = cu_q.data(), *k = cu_k.data();
    require(q[0] == 0 && k[0] == 0, "attention_tiles: cu_seqlens does not begin with 0");
    std::vector<Document> found;
    for (int64_t s = 0; s + 1 < cu_q.size(); ++s) {
        require(q[s] <= q[s + 1] && k[s] <= k[s + 1], "attention_tiles: cu_seqlens decreases");
        found.push_back({q[s], q[s + 1], k[s], k[s + 1]});
    }
    return found;
}

void attention_tiles(const Dense<int32_t>& cu_q, const Dense<int32_t>& cu_k, const std::optional<Dense<int32_t>>& kv_lo,
                     const std::optional<Dense<int32_t>>& kv_hi, int64_t block_q, int64_t block_k, int64_t step,
                     Dense<int32_t>& q_tiles, Dense<int32_t>& k_tiles) {
    require(step > 0 && block_k > 0 && block_q > 0 && block_q % step == 0, "attention_tiles: blocks do not fit");
    const std::vector<Document> docs = documents(cu_q, cu_k);
    const int32_t Tq = docs.empty() ? 0 : docs.back().q1, Tk = docs.empty() ? 0 : docs.back().k1;
    const int64_t S = static_cast<int64_t>(docs.size());
    require(q_tiles.size() == (Tq / block_q + S) * kWidth && k_tiles.size() == (Tk / block_k + S) * kWidth,
            "attention_tiles: the lists have another size than the documents ask for");
    Lists lists{bounds(kv_lo, Tq), bounds(kv_hi, Tq), {block_q, block_k, step}, {}, {}, {}};
    int32_t *q_out = q_tiles.mutable_data(), *k_out = k_tiles.mutable_data();
    const int64_t q_room = q_tiles.size(), k_room = k_tiles.size();
    py::gil_scoped_release release;
    for (const Document& d : docs) lists.add(d);
    std::fill_n(q_out, q_room, 0);
    std::fill_n(k_out, k_room, 0);
    write_longest_first(lists.q, q_out);
    write_longest_first(lists.k, k_out);
}

}  // namespace

void bind_attention_tiles(py::module_& m) {
    m.def("attention_tiles", &attention_tiles, py::arg("cu_q").noconvert(), py::arg("cu_k").noconvert(),
          py::arg("kv_lo").noconvert(), py::arg("kv_hi").noconvert(), py::arg("block_q"), py::arg("block_k"),
          py::arg("step"), py::arg("q_tiles").noconvert(), py::arg("k_tiles").noconvert(),
          "The work list of packed attention -> writes q_tiles[Tq // block_q + S, 8], k_tiles[Tk // block_k + S, 8].");
}
