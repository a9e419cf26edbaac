// The tables of a segmented sum: entries sorted by destination, cut into pieces of bounded length.
#include <algorithm>
#include <array>
#include <utility>

#include "vkernels/host.h"

namespace {

constexpr int kDigit = 11;  // two passes for 2^22 destinations; counters of 8 KB stay in the first-level cache

// One range of destinations: the ids in [base, base + size) of vector `vector` go to start + id - base.
struct Range {
    int64_t base, size, start;
};

// Stable sort of the entries 0..n-1 by key, in order; keys are below `end`, and sorted as well.
void radix_sort(std::vector<int32_t>& keys, int32_t* order, int64_t end) {
    const size_t n = keys.size();
    std::vector<int32_t> other_keys(n), other(n);
    int32_t *from = order, *to = other.data();
    for (size_t i = 0; i < n; ++i) from[i] = static_cast<int32_t>(i);
    std::array<size_t, 1 << kDigit> place;
    for (int shift = 0; (end - 1) >> shift > 0; shift += kDigit) {
        const int32_t mask = (1 << kDigit) - 1;
        place.fill(0);
        for (int32_t k : keys) ++place[(k >> shift) & mask];
        size_t before = 0;
        for (auto& p : place) before += std::exchange(p, before);
        for (size_t i = 0; i < n; ++i) {
            const size_t at = place[(keys[i] >> shift) & mask]++;
            to[at] = from[i];
            other_keys[at] = keys[i];
        }
        keys.swap(other_keys);
        std::swap(from, to);
    }
    if (from != order) std::copy(from, from + n, order);
}

// Writes the tables from sorted keys; false if they do not hold what comes.
bool cut(const std::vector<int32_t>& keys, int64_t destinations, int64_t chunk, int64_t max_pieces, int64_t max_joins,
         int64_t max_rows, int32_t* pieces, int32_t* joins, int32_t* rows, int32_t* counts) {
    const auto n = static_cast<int64_t>(keys.size());
    int64_t piece = 0, join = 0, segment = 0, slot = 0;
    const auto put = [](int32_t*& at, int64_t a, int64_t b, int64_t c, int64_t d) {
        for (int64_t v : {a, b, c, d}) *at++ = static_cast<int32_t>(v);
    };
    for (int64_t begin = 0, end; begin < n && keys[begin] < destinations; begin = end, ++segment) {
        for (end = begin + 1; end < n && keys[end] == keys[begin];) ++end;
        const int64_t parts = (end - begin + chunk - 1) / chunk;
        if (segment >= max_rows || piece + parts > max_pieces || (parts > 1 && join >= max_joins)) return false;
        rows[segment] = keys[begin];
        piece += parts;
        if (parts > 1) {
            put(joins, slot, slot + parts, keys[begin], ~segment);
            ++join;
        }
        for (int64_t at = begin; at < end; at += chunk)
            put(pieces, at, std::min(at + chunk, end), keys[begin], parts > 1 ? slot++ : ~segment);
    }
    counts[0] = static_cast<int32_t>(piece);
    counts[1] = static_cast<int32_t>(join);
    counts[2] = static_cast<int32_t>(segment);
    return true;
}

int32_t* table_of(Dense<int32_t>& x, int64_t columns, const char* what) {
    require(x.ndim() == (columns == 1 ? 1 : 2) && (columns == 1 || x.shape(1) == columns), what);
    std::fill(x.mutable_data(), x.mutable_data() + x.size(), 0);
    return x.mutable_data();
}

void embed_order(const std::vector<Dense<int32_t>>& indices, const std::vector<int64_t>& which,
                 const std::vector<int64_t>& bases, const std::vector<int64_t>& sizes, int64_t chunk,
                 Dense<int32_t>& order, Dense<int32_t>& pieces, Dense<int32_t>& joins, Dense<int32_t>& rows,
                 Dense<int32_t>& counts) {
    const char* bad =
        "embed_order: expected int32 index vectors [T], as many which, bases and sizes, order[vectors * T], "
        "pieces[P, 4], joins[J, 4], rows[U], counts[3]";
    require(!indices.empty() && which.size() == bases.size() && bases.size() == sizes.size() && chunk > 0, bad);
    const int64_t T = indices[0].size(), n = T * static_cast<int64_t>(indices.size());
    for (const auto& v : indices) require(v.ndim() == 1 && v.shape(0) == T, bad);
    require(order.ndim() == 1 && order.shape(0) == n && n < INT32_MAX, bad);
    require(counts.ndim() == 1 && counts.shape(0) == 3, bad);
    std::vector<std::vector<Range>> ranges(indices.size());
    int64_t destinations = 0;
    for (size_t i = 0; i < which.size(); ++i) {
        require(which[i] >= 0 && which[i] < static_cast<int64_t>(indices.size()) && sizes[i] >= 0, bad);
        ranges[which[i]].push_back({bases[i], sizes[i], destinations});
        destinations += sizes[i];
        require(destinations < INT32_MAX, "embed_order: expected fewer than 2^31 destinations");
    }
    std::vector<const int32_t*> from;
    for (const auto& v : indices) from.push_back(v.data());
    int32_t *to_pieces = table_of(pieces, 4, bad), *to_joins = table_of(joins, 4, bad), *to_rows = table_of(rows, 1, bad),
            *to_counts = counts.mutable_data(), *to_order = order.mutable_data();
    const int64_t P = pieces.shape(0), J = joins.shape(0), U = rows.shape(0);
    bool fits;
    {
        py::gil_scoped_release release;
        std::vector<int32_t> keys(n, static_cast<int32_t>(destinations));
        for (size_t v = 0; v < from.size(); ++v)
            for (const Range& r : ranges[v])
                for (int64_t t = 0; t < T; ++t)
                    if (from[v][t] >= r.base && from[v][t] < r.base + r.size)
                        keys[v * T + t] = static_cast<int32_t>(r.start + from[v][t] - r.base);
        radix_sort(keys, to_order, destinations + 1);
        fits = cut(keys, destinations, chunk, P, J, U, to_pieces, to_joins, to_rows, to_counts);
    }
    require(fits, "embed_order: the tables are too small for these ids");
}

}  // namespace

void bind_embed_order(py::module_& m) {
    m.def("embed_order", &embed_order, py::arg("indices").noconvert(), py::arg("which"), py::arg("bases"),
          py::arg("sizes"), py::arg("chunk"), py::arg("order").noconvert(), py::arg("pieces").noconvert(),
          py::arg("joins").noconvert(), py::arg("rows").noconvert(), py::arg("counts").noconvert(),
          "Sorts the entries of all index vectors by destination and cuts them into pieces of at most `chunk`.");
}
