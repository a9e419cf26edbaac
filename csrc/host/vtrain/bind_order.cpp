// Python face of order.h.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "order.h"

namespace py = pybind11;

namespace {

using Int64s = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

uint64_t low_bits(const py::int_& key) {
    const uint64_t bits = PyLong_AsUnsignedLongLongMask(key.ptr());
    if (bits == ~0ull && PyErr_Occurred()) throw py::error_already_set();
    return bits;
}

uint64_t size_of(const py::int_& n) {  // 0, which no order accepts, for what does not fit
    const py::int_ most(vtrain::Order::kMaxSize);
    if (n < py::int_(1) || n > most) throw py::value_error("the order of " + std::string(py::str(n)) +
                                                           " samples: expected 1..2**62");
    return low_bits(n);
}

template <class Order>
Int64s at(const Order& order, const Int64s& positions) {
    Int64s out(std::vector<py::ssize_t>(positions.shape(), positions.shape() + positions.ndim()));
    const int64_t* from = positions.data();
    int64_t* to = out.mutable_data();
    const size_t count = static_cast<size_t>(positions.size());
    py::gil_scoped_release release;
    order.at(from, count, to);
    return out;
}

template <class Order>
Int64s range(const Order& order, int64_t start, int64_t count) {
    if (start < 0 || count < 0) throw py::index_error("range: start and count must not be negative");
    vtrain::check_range(static_cast<uint64_t>(start), static_cast<size_t>(count), order.size());
    Int64s out(count);
    int64_t* to = out.mutable_data();
    py::gil_scoped_release release;
    order.range(static_cast<uint64_t>(start), static_cast<size_t>(count), to);
    return out;
}

}  // namespace

void bind_order(py::module_& m) {
    using vtrain::BlockOrder;
    using vtrain::Order;
    py::class_<Order>(m, "Order",
                      "A permutation of 0..n-1 by a 64-bit key: order(positions) -> ids, int64 of any shape.")
        .def(py::init([](const py::int_& n, const py::int_& key) { return Order(size_of(n), low_bits(key)); }),
             py::arg("n"), py::arg("key"))
        .def("__len__", &Order::size)
        .def("__call__", &at<Order>, py::arg("positions"))
        .def("range", &range<Order>, py::arg("start"), py::arg("count"), "order(start..start+count-1), but faster.")
        .def(
            "portable",
            [](const Order& order, const Int64s& positions) {
                Int64s out(positions.size());
                order.at(positions.data(), static_cast<size_t>(positions.size()), out.mutable_data(), true);
                return out;
            },
            py::arg("positions"), "The plain twin of a call, for machines without AVX2; flat.");
    py::class_<BlockOrder>(m, "BlockOrder",
                           "Permuted blocks, `open` at a time, the samples of each such window permuted.")
        .def(py::init([](const py::int_& n, const py::int_& key, uint64_t block, uint64_t open) {
                 return BlockOrder(size_of(n), low_bits(key), block, open);
             }),
             py::arg("n"), py::arg("key"), py::arg("block"), py::arg("open"))
        .def("__len__", &BlockOrder::size)
        .def("__call__", &at<BlockOrder>, py::arg("positions"))
        .def("range", &range<BlockOrder>, py::arg("start"), py::arg("count"));
}
