// Python face of crc32c.h.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>

#include "crc32c.h"

namespace py = pybind11;

namespace {

struct Bytes {  // a contiguous read-only view of any buffer
    explicit Bytes(const py::buffer& b) : info(b.request()) {
        py::ssize_t expected = info.itemsize;
        for (py::ssize_t i = info.ndim - 1; i >= 0; --i) {
            if (info.shape[i] > 1 && info.strides[i] != expected)
                throw py::value_error("crc32c: the buffer is not contiguous");
            expected *= info.shape[i];
        }
    }
    const uint8_t* data() const { return static_cast<const uint8_t*>(info.ptr); }
    size_t size() const { return static_cast<size_t>(info.size) * static_cast<size_t>(info.itemsize); }
    py::buffer_info info;
};

}  // namespace

void bind_crc32c(py::module_& m) {
    m.def(
        "crc32c",
        [](const py::buffer& data, uint32_t value) {
            Bytes bytes(data);
            py::gil_scoped_release release;
            return vtrain::crc32c(value, bytes.data(), bytes.size());
        },
        py::arg("data"), py::arg("value") = 0,
        "crc32c of a contiguous buffer, continuing from `value` (the crc of what came before).");
    m.def(
        "crc32c_portable",
        [](const py::buffer& data, uint32_t value) {
            Bytes bytes(data);
            return vtrain::crc32c_portable(value, bytes.data(), bytes.size());
        },
        py::arg("data"), py::arg("value") = 0, "The table-driven twin of crc32c, for machines without SSE4.2.");
    m.def(
        "crc32c_lanes",
        [](const py::buffer& data, uint32_t value) {
            Bytes bytes(data);
            return vtrain::crc32c_lanes(value, bytes.data(), bytes.size());
        },
        py::arg("data"), py::arg("value") = 0, "The twin of crc32c for machines without VPCLMULQDQ.");
    m.def(
        "crc32c_combine", &vtrain::crc32c_combine, py::arg("first"), py::arg("second"), py::arg("second_bytes"),
        "crc32c of A+B from the crcs of A and B and the length of B.");
    m.def(
        "crc32c_blocks",
        [](const py::buffer& data, size_t block) {
            if (block == 0) throw py::value_error("crc32c_blocks: block must be positive");
            Bytes bytes(data);
            size_t n = (bytes.size() + block - 1) / block;
            py::array_t<uint32_t> out(static_cast<py::ssize_t>(n));
            uint32_t* o = out.mutable_data();
            py::gil_scoped_release release;
            for (size_t i = 0; i < n; ++i) {
                size_t at = i * block, left = bytes.size() - at;
                o[i] = vtrain::crc32c(0, bytes.data() + at, std::min(left, block));
            }
            return out;
        },
        py::arg("data"), py::arg("block"),
        "crc32c of every block of `block` bytes (the last may be shorter) -> u32[n].");
}
