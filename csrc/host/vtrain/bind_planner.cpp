// Python face of planner.h.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "planner.h"

namespace py = pybind11;

namespace {

using vtrain::Cursor;
using vtrain::Limits;
using vtrain::Planned;
using vtrain::Planner;

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

constexpr int32_t kMostTokens = 1 << 27;  // the packer keeps 16 bytes per possible length

Limits checked_limits(int64_t tokens, int64_t documents, int64_t pool) {
    if (tokens < 1 || documents < 1 || pool < 1 || tokens > kMostTokens || documents > INT32_MAX || pool > kMostTokens)
        throw py::value_error("packer: pack_tokens " + std::to_string(tokens) + ", max_documents " +
                              std::to_string(documents) + ", pool " + std::to_string(pool) +
                              "; expected all >= 1, pack_tokens and pool at most 2**27");
    return {static_cast<int32_t>(tokens), static_cast<int32_t>(documents), Limits::kNoCap, Limits::kNoCap,
            static_cast<int32_t>(pool)};
}

// One field of every item as an array.
template <class T, class Field>
py::array_t<T> column(const std::vector<Planned>& items, Field field) {
    py::array_t<T> out(static_cast<py::ssize_t>(items.size()));
    T* to = out.mutable_data();
    for (const Planned& item : items) *to++ = static_cast<T>(field(item));
    return out;
}

py::tuple take(Planner& planner) {
    std::vector<Planned> items;
    std::vector<int64_t> starts = {0};
    items.swap(planner.items);
    starts.swap(planner.bin_starts);
    return py::make_tuple(column<int32_t>(items, [](auto& p) { return p.source; }),
                          column<int64_t>(items, [](auto& p) { return p.epoch; }),
                          column<int64_t>(items, [](auto& p) { return p.position; }),
                          column<int64_t>(items, [](auto& p) { return p.index; }),
                          column<int32_t>(items, [](auto& p) { return p.start; }),
                          column<int32_t>(items, [](auto& p) { return p.length; }),
                          column<int32_t>(items, [](auto& p) { return p.full; }),
                          py::array_t<int64_t>(static_cast<py::ssize_t>(starts.size()), starts.data()));
}

py::array_t<int64_t> waiting(const Planner& planner) {
    std::vector<Planned> items;
    planner.packer().each([&](const Planned& p) { items.push_back(p); });
    py::array_t<int64_t> out({py::ssize_t{5}, static_cast<py::ssize_t>(items.size())});
    auto to = out.mutable_unchecked<2>();
    for (py::ssize_t i = 0; i < to.shape(1); ++i) {
        const Planned& p = items[static_cast<size_t>(i)];
        const int64_t values[] = {p.source, p.epoch, p.position, p.start, p.to_end ? 0 : p.start + int64_t{p.length}};
        for (py::ssize_t c = 0; c < 5; ++c) to(c, i) = values[c];
    }
    return out;
}

int64_t restore(Planner& planner, const Array<int64_t>& table) {
    if (table.ndim() != 2 || table.shape(0) != 9) throw py::value_error("planner: expected int64[9, n] to restore");
    const auto t = table.unchecked<2>();
    for (py::ssize_t i = 0; i < t.shape(1); ++i) {
        const int64_t start = t(4, i), stop = t(5, i), full = t(6, i);
        if (t(0, i) < 0 || t(0, i) >= static_cast<int64_t>(planner.size()) || full < 0 || full > INT32_MAX ||
            start < 0 || start >= full || (stop && (stop <= start || stop > full)) || t(7, i) < 0 || t(8, i) < 0)
            throw py::value_error("planner: a waiting sample is outside its source");
        const int32_t length = static_cast<int32_t>((stop ? stop : full) - start);
        const bool whole = length == full;
        const int32_t rows = static_cast<int32_t>(std::min<int64_t>(t(7, i), whole ? INT32_MAX : length));
        if (!planner.restore({static_cast<int32_t>(t(0, i)), static_cast<int32_t>(start), length,
                              static_cast<int32_t>(full), rows,
                              static_cast<int32_t>(std::min<int64_t>(t(8, i), INT32_MAX)), t(1, i), t(2, i), t(3, i),
                              stop == 0}))
            return i;
    }
    return -1;
}

py::object deficit(Planner& planner, size_t source) {
    const __int128 value = planner.mixture().deficit(source);
    const py::int_ high(static_cast<int64_t>(value >> 64)), low(static_cast<uint64_t>(value));
    return (high << py::int_(64)) + low;
}

void set_deficit(Planner& planner, size_t source, const py::int_& value) {
    const py::int_ bound = py::int_(py::int_(1) << py::int_(100));
    if (value >= bound || py::int_(-bound) > value) throw py::value_error("planner: a deficit beyond 2**100");
    const int64_t high = py::cast<int64_t>(value >> py::int_(64));
    const uint64_t low = py::cast<uint64_t>(value & py::int_(~0ull));
    const unsigned __int128 bits = (static_cast<unsigned __int128>(high) << 64) | low;
    planner.mixture().set_deficit(source, static_cast<__int128>(bits));
}

const char* run(Planner& planner, size_t bins) {
    py::gil_scoped_release release;
    switch (planner.run(bins)) {
        case Planner::Status::kFeed: return "feed";
        case Planner::Status::kOverlong: return "overlong";
        case Planner::Status::kUseless: return "useless";
        default: return "step";
    }
}

void feed(Planner& planner, size_t source, const Array<int64_t>& index, const Array<int32_t>& length,
          const std::optional<Array<int32_t>>& extents, const Array<uint8_t>& skip) {
    const py::ssize_t n = index.size();
    if (length.size() != n || skip.size() != n || (extents && extents->size() != 2 * n))
        throw py::value_error("planner: index, length, extents and skip differ in length");
    std::vector<int32_t> rows, frames;
    for (py::ssize_t i = 0; extents && i < n; ++i) {
        rows.push_back(extents->data()[2 * i]);
        frames.push_back(extents->data()[2 * i + 1]);
    }
    planner.feed(source, static_cast<size_t>(n), index.data(), length.data(), extents ? rows.data() : nullptr,
                 extents ? frames.data() : nullptr, skip.data());
}

struct Plain {  // an item of `pack`
    int32_t length;
    int64_t index;
    static constexpr int32_t rows = 0, frames = 0;
};

py::tuple pack(const Array<int32_t>& lengths, int64_t pack_tokens, int64_t pool, std::optional<int64_t> max_documents) {
    const size_t n = static_cast<size_t>(lengths.size());
    const int32_t* length = lengths.data();
    const Limits limits = checked_limits(pack_tokens, max_documents.value_or(INT32_MAX), pool);
    for (size_t i = 0; i < n; ++i)
        if (length[i] < 1 || length[i] > limits.tokens)
            throw py::value_error("pack: sample " + std::to_string(i) + " has " + std::to_string(length[i]) +
                                  " tokens; expected 1.." + std::to_string(limits.tokens));
    py::array_t<int64_t> order(static_cast<py::ssize_t>(n));
    int64_t* to = order.mutable_data();
    const int64_t* const begin = to;
    std::vector<int64_t> starts = {0};
    {
        py::gil_scoped_release release;
        using Packer = vtrain::Packer<Plain>;
        Packer packer(limits);
        size_t at = 0;
        const auto draw = [&] {
            if (at == n) return Packer::Draw::kEnd;
            packer.add({length[at], static_cast<int64_t>(at)});
            ++at;
            return Packer::Draw::kMore;
        };
        while (packer.fill(draw, [&](const Plain& item) { *to++ = item.index; }) == Packer::Fill::kBin)
            starts.push_back(to - begin);
    }
    return py::make_tuple(order, py::array_t<int64_t>(static_cast<py::ssize_t>(starts.size()), starts.data()));
}

}  // namespace

void bind_planner(py::module_& m) {
    m.def("pack", &pack, py::arg("lengths"), py::arg("pack_tokens"), py::arg("pool") = 512,
          py::arg("max_documents") = py::none(),
          "Bins of the samples of these lengths: (order int64[n], bin_cu int64[bins+1]). Bin b holds the samples\n"
          "order[bin_cu[b]:bin_cu[b+1]].");
    py::class_<Cursor>(m, "Cursor")
        .def_readwrite("n", &Cursor::n)
        .def_readwrite("epoch", &Cursor::epoch)
        .def_readwrite("position", &Cursor::position)
        .def_readwrite("samples", &Cursor::samples)
        .def_readwrite("tokens", &Cursor::tokens)
        .def_readwrite("dropped", &Cursor::dropped)
        .def_readwrite("cropped", &Cursor::cropped)
        .def_readwrite("split", &Cursor::split)
        .def_readwrite("empty", &Cursor::empty)
        .def_readwrite("excluded", &Cursor::excluded)
        .def_readwrite("filtered", &Cursor::filtered);
    py::class_<Planner>(m, "Planner", "Mixture and packer of vtrain.data.plan.Plan.")
        .def(py::init([](int64_t tokens, int64_t documents, int64_t pool, int overlong, std::optional<int32_t> rows,
                         std::optional<int32_t> frames) {
                 Limits limits = checked_limits(tokens, documents, pool);
                 if (overlong < 0 || overlong > static_cast<int>(vtrain::Overlong::kCrop) || rows.value_or(0) < 0 ||
                     frames.value_or(0) < 0)
                     throw py::value_error("planner: overlong or a cap is out of range");
                 limits.rows = rows.value_or(Limits::kNoCap);
                 limits.frames = frames.value_or(Limits::kNoCap);
                 return Planner(limits, static_cast<vtrain::Overlong>(overlong));
             }),
             py::arg("pack_tokens"), py::arg("max_documents"), py::arg("pool"), py::arg("overlong"), py::arg("rows"),
             py::arg("frames"))
        .def("add", &Planner::add, py::arg("at"), py::arg("weights"), py::arg("samples"), py::arg("max_epochs"))
        .def("start", &Planner::start, py::arg("tokens"))
        .def("run", &run, py::arg("bins"), "step, or what it needs: feed, overlong, useless (of `source`).")
        .def("feed", &feed, py::arg("source"), py::arg("index"), py::arg("length"), py::arg("extents"), py::arg("skip"))
        .def("take", &take, "source, epoch, position, index, start, length, full and bin_cu of the step.")
        .def("waiting", &waiting, "int64[5, n]: source, epoch, position, start, stop (0 = to the end), oldest first.")
        .def("restore", &restore, py::arg("table"),
             "Waiting samples int64[9, n]: source, epoch, position, index, start, stop, full, rows, frames. The number\n"
             "of the first over-long one where that is an error, else -1.")
        .def("cursor", &Planner::cursor, py::return_value_policy::reference_internal)
        .def("deficit", &deficit)
        .def("set_deficit", &set_deficit)
        .def("active", [](Planner& p, size_t source) { return p.mixture().active(source); })
        .def_property_readonly("source", &Planner::source)
        .def_property_readonly("overlong", &Planner::overlong)
        .def_property_readonly("tokens", [](Planner& p) { return p.mixture().tokens(); });
}
