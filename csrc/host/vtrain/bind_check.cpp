// Python face of check.h and planes.h.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "check.h"
#include "vtrain/planes.h"

namespace py = pybind11;

namespace {

using vtrain::Batch;
using vtrain::Extremes;
using vtrain::Found;
using vtrain::PackedSegment;
using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Offsets = py::array_t<int64_t, py::array::c_style>;

// Ids, and the arrays that hold them.
struct ArrayIds {
    ArrayIds(py::array data, std::optional<Bytes> high, int bits, uint64_t first, std::optional<uint64_t> count,
             bool portable)
        : array(std::move(data)), plane(std::move(high)), ids(view(bits, first, count, portable)) {}

    vtrain::Ids view(int bits, uint64_t first, std::optional<uint64_t> count, bool portable) const {
        if (array.ndim() != 1 || !(array.flags() & py::array::c_style))
            throw py::value_error("ids: expected a flat contiguous array");
        if (plane && plane->ndim() != 1) throw py::value_error("ids: expected a flat plane");
        const char kind = array.dtype().byteorder() == '>' ? '?' : array.dtype().kind();
        return {array.data(), kind, static_cast<int>(array.itemsize()), static_cast<uint64_t>(array.size()),
                plane ? plane->data() : nullptr, plane ? static_cast<uint64_t>(plane->size()) : 0, bits, first, count,
                portable};
    }

    py::array array;
    std::optional<Bytes> plane;
    vtrain::Ids ids;
};

const int64_t* checked(const Offsets& cu, size_t n, uint64_t size, const char* name) {
    vtrain::check_offsets(cu.data(), cu.ndim() == 1 ? static_cast<size_t>(cu.size()) : 0, n, size, name);
    return cu.data();
}

py::tuple check_samples(const ArrayIds& ids, const Offsets& cu, const py::array& segments, const Offsets& segment_cu,
                        const py::array_t<uint64_t, py::array::c_style>& keys,
                        const std::optional<py::array_t<uint32_t, py::array::c_style>>& runs,
                        const std::optional<Offsets>& run_cu, const ArrayIds* labels,
                        const py::array_t<int64_t, py::array::c_style>& spans, int64_t vocab, int64_t roles) {
    size_t n = static_cast<size_t>(keys.size());
    if (segments.ndim() != 1 || segments.itemsize() != sizeof(PackedSegment) ||
        !(segments.flags() & py::array::c_style))
        throw py::value_error("segments: expected a flat contiguous array of format.SEGMENT");
    if (spans.ndim() != 3 || spans.shape(0) != 2 || spans.shape(2) != 2)
        throw py::value_error("spans: expected [2, modalities, 2] ids");
    if (runs.has_value() != run_cu.has_value()) throw py::value_error("runs and run_cu go together");
    if (labels && labels->ids.size() != ids.ids.size()) throw py::value_error("labels: expected one for every id");
    Batch batch{};
    batch.ids = &ids.ids;
    batch.labels = labels ? &labels->ids : nullptr;
    batch.cu = checked(cu, n, ids.ids.size(), "cu");
    batch.segments = static_cast<const PackedSegment*>(segments.data());
    batch.segment_cu = checked(segment_cu, n, static_cast<uint64_t>(segments.size()), "segment_cu");
    batch.keys = keys.data();
    batch.runs = runs ? runs->data() : nullptr;
    batch.run_cu = runs ? checked(*run_cu, n, static_cast<uint64_t>(runs->size()), "run_cu") : nullptr;
    batch.spans = spans.data();
    batch.modalities = spans.shape(1);
    batch.roles = roles;
    batch.vocab = vocab;
    batch.count = n;
    Found found;
    Extremes seen;
    {
        py::gil_scoped_release release;
        found = vtrain::check(batch, seen);
    }
    bool none = seen.low > seen.high;
    return py::make_tuple(static_cast<int>(found.rule), found.sample, found.item, found.value, none ? 0 : seen.low,
                          none ? -1 : seen.high);
}

// Lengths per bin of format.LENGTH_EDGES: two bins per octave.
py::array_t<uint64_t> length_histogram(const py::array_t<int64_t, py::array::c_style>& lengths) {
    py::array_t<uint64_t> out(64);
    uint64_t* bins = out.mutable_data();
    std::fill(bins, bins + 64, 0);
    const int64_t* p = lengths.data();
    for (size_t i = 0; i < static_cast<size_t>(lengths.size()); ++i) {
        if (p[i] < 0 || p[i] >> 32) throw py::value_error("length_histogram: expected lengths in 0..2**32-1");
        uint64_t n = static_cast<uint64_t>(p[i]);
        int octave = n < 2 ? 0 : 63 - __builtin_clzll(n);
        ++bins[n < 2 ? n : 2 * static_cast<uint64_t>(octave) + (n >> (octave - 1) & 1)];
    }
    return out;
}

// Whether all bytes are zero: padding.
bool all_zero(const Bytes& data) {
    const uint8_t* p = data.data();
    size_t n = static_cast<size_t>(data.size());
    py::gil_scoped_release release;
    return n == 0 || (p[0] == 0 && std::memcmp(p, p + 1, n - 1) == 0);
}

py::array_t<uint8_t> copy_of(const std::vector<uint8_t>& bytes) {
    return py::array_t<uint8_t>(static_cast<py::ssize_t>(bytes.size()), bytes.data());
}

}  // namespace

void bind_check(py::module_& m) {
    py::class_<ArrayIds>(m, "Ids",
                         "Ids to check: some of a flat integer array, or of the two planes of a shard. portable: for "
                         "tests.")
        .def(py::init<py::array, std::optional<Bytes>, int, uint64_t, std::optional<uint64_t>, bool>(),
             py::arg("data"), py::arg("plane") = py::none(), py::arg("bits") = 0, py::arg("first") = 0,
             py::arg("count") = py::none(), py::arg("portable") = false);
    m.def("check_samples", &check_samples, py::arg("ids"), py::arg("cu"), py::arg("segments"), py::arg("segment_cu"),
          py::arg("keys"), py::arg("runs"), py::arg("run_cu"), py::arg("labels"), py::arg("spans"), py::arg("vocab"),
          py::arg("roles"),
          "(rule, sample, item, value, lowest id, highest id): the first broken rule (0 = none) and what was seen.");
    m.def("length_histogram", &length_histogram, py::arg("lengths"),
          "u64[64]: how many of int64[n] lengths, 0..2**32-1, fall into each bin of format.LENGTH_EDGES.");
    m.def("all_zero", &all_zero, py::arg("data"), "Whether every byte is zero.");
    py::class_<vtrain::PlaneBytes>(m, "PlaneBytes", "Collects the 1 or 2 bits above the low 16 of ids.")
        .def(py::init([](int bits) {
                 if (bits < 1 || bits > 2) throw py::value_error("a plane has 1 or 2 bits per id");
                 return vtrain::PlaneBytes(bits);
             }),
             py::arg("bits"))
        .def(
            "split",
            [](vtrain::PlaneBytes& self, const py::array_t<int32_t, py::array::c_style>& ids,
               py::array_t<uint16_t, py::array::c_style> low) {
                if (low.size() != ids.size()) throw py::value_error("split: expected one low half for every id");
                const int32_t* p = ids.data();
                size_t n = static_cast<size_t>(ids.size());
                uint16_t* out = low.mutable_data();
                {
                    py::gil_scoped_release release;
                    self.split(p, n, out);
                }
                Bytes full;
                self.drain([&](const uint8_t* bytes, size_t count) {
                    full = Bytes(static_cast<py::ssize_t>(count), bytes);
                });
                return full;
            },
            py::arg("ids"), py::arg("low").noconvert(),
            "The low 16 bits of int32[n] go to u16[n]; the bytes of the plane that became full -> u8[m].")
        .def("rest", [](const vtrain::PlaneBytes& self) { return copy_of(self.data()); },
             "u8[0 or 1]: the last byte, that is not full.");
}
