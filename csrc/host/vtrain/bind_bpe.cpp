// Python face of bpe.h.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string_view>

#include "bpe.h"

namespace py = pybind11;

namespace {

using vtrain::MergeTable;
using Ids = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

MergeTable merge_table(const Ids& byte_ids, const Ids& left, const Ids& right, const Ids& result, const Ids& rank) {
    if (byte_ids.size() != 256) throw py::value_error("MergeTable: byte_ids must have 256 entries");
    if (left.size() != right.size() || left.size() != result.size() || left.size() != rank.size())
        throw py::value_error("MergeTable: left, right, result and rank differ in length");
    return {byte_ids.data(), static_cast<size_t>(left.size()), left.data(), right.data(), result.data(), rank.data()};
}

}  // namespace

void bind_bpe(py::module_& m) {
    py::class_<MergeTable>(m, "MergeTable", "Byte-pair merges by rank.")
        .def(py::init(&merge_table), py::arg("byte_ids"), py::arg("left"), py::arg("right"), py::arg("result"),
             py::arg("rank"),
             "byte_ids int32[256]; merge i joins the ids left[i], right[i] into result[i], lowest rank[i] first.")
        .def(
            "encode",
            [](const MergeTable& table, const py::bytes& piece) {
                const std::string_view view(piece);
                if (view.size() < 4096) return table.encode(view);
                py::gil_scoped_release unlocked;  // the bytes object stays referenced by the caller
                return table.encode(view);
            },
            py::arg("piece"), "The ids of one piece (bytes) as a list.");
}
