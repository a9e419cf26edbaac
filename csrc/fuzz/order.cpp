// order.h: both orders are bijections, and every way to ask gives the same.
#include <algorithm>
#include <set>
#include <stdexcept>

#include "input.h"
#include "vtrain/order.h"

namespace {

using fuzz::claim;
using fuzz::Input;
using Numbers = std::vector<int64_t>;

// The portable twin, where an order has one.
void at_portable(const vtrain::Order& order, const Numbers& positions, Numbers& out) {
    order.at(positions.data(), positions.size(), out.data(), true);
}
void at_portable(const vtrain::BlockOrder& order, const Numbers& positions, Numbers& out) {
    order.at(positions.data(), positions.size(), out.data());
}

// `count` positions from `start` on, which are there.
template <class Order>
Numbers some(const Order& order, uint64_t start, size_t count) {
    Numbers positions(count), ranged(count), at(count), portable(count);
    for (size_t i = 0; i < count; ++i) positions[i] = static_cast<int64_t>(start + i);
    order.range(start, count, ranged.data());
    order.at(positions.data(), count, at.data());
    at_portable(order, positions, portable);
    claim(ranged == at && at == portable, "range, at and the portable twin agree");
    for (int64_t id : at) claim(id >= 0 && static_cast<uint64_t>(id) < order.size(), "samples are below n");
    order.at(positions.data(), count, positions.data());
    claim(positions == at, "an order may work in place");
    return at;
}

template <class Step>
bool refused(Step&& step) {
    try {
        step();
    } catch (const std::out_of_range&) {
        return true;
    }
    return false;
}

template <class Order>
void check_refusals(const Order& order, int64_t position, uint64_t start, size_t count) {
    const uint64_t n = order.size();
    int64_t id;
    claim(refused([&] { order.at(&position, 1, &id); }) == (static_cast<uint64_t>(position) >= n),
          "positions outside are refused");
    if (start > n || count > n - start)
        claim(refused([&] { order.range(start, count, nullptr); }), "ranges outside are refused");
}

template <class Order>
void try_order(const Order& order, Input& in) {
    check_refusals(order, in.number<int64_t>(), in.number<uint64_t>(), in.number<uint32_t>());
    const uint64_t n = order.size();
    if (n > 6000) {  // windows of a large one: different positions give different samples
        std::set<uint64_t> positions;
        std::set<int64_t> samples;
        for (int w = 0; w < 4; ++w) {
            const uint64_t start = in.number<uint64_t>() % n, count = std::min<uint64_t>(in.below(200), n - start);
            for (uint64_t i = 0; i < count; ++i) positions.insert(start + i);
            for (int64_t id : some(order, start, count)) samples.insert(id);
        }
        claim(samples.size() == positions.size(), "no sample stands at two positions");
        return;
    }
    Numbers all;
    for (uint64_t at = 0; at < n;) {
        const Numbers part = some(order, at, std::min<uint64_t>(in.within(1, 3000), n - at));
        all.insert(all.end(), part.begin(), part.end());
        at += part.size();
    }
    std::sort(all.begin(), all.end());
    for (size_t i = 0; i < n; ++i) claim(all[i] == static_cast<int64_t>(i), "every sample stands once");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Input in(data, size);
    const auto kind = in.number<uint8_t>();
    const uint64_t n = kind & 1 ? in.number<uint64_t>() : in.below(kind & 16 ? 6001 : 500), key = in.number<uint64_t>();
    try {
        if (kind & 2) {
            const auto block = kind & 4 ? in.number<uint64_t>() : in.below(300);
            const auto open = kind & 8 ? in.number<uint64_t>() : in.below(20);
            try_order(vtrain::BlockOrder(n, key, block, open), in);
        } else {
            try_order(vtrain::Order(n, key), in);
        }
    } catch (const std::invalid_argument&) {  // of a size, block or window that is not allowed
    }
    return 0;
}
