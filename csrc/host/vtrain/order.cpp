#include "order.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace vtrain {

namespace {

constexpr size_t kTile = 512;  // halves of as many positions stay in the first-level cache

inline uint32_t murmur(uint32_t h) {
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
    h = (h ^ (h >> 13)) * 0xC2B2AE35u;
    return h ^ (h >> 16);
}

// half + (a draw scaled to 0..modulus-1), modulo modulus. Both terms are below 2^31.
inline uint32_t add(uint32_t half, uint32_t draw, uint32_t modulus) {
    const uint32_t total = half + static_cast<uint32_t>((static_cast<uint64_t>(draw) * modulus) >> 32);
    return std::min(total, total - modulus);  // below the modulus the difference wraps to a large number
}

// All rounds over arrays of halves; out[i] = x * b + y. Inlined into functions for several instruction sets.
__attribute__((always_inline)) inline void rounds(const uint32_t* x, const uint32_t* y, size_t count, uint32_t a,
                                                  uint32_t b, const uint32_t* keys, int64_t* out) {
    const uint32_t k0 = keys[0], k1 = keys[1], k2 = keys[2], k3 = keys[3], k4 = keys[4], k5 = keys[5];
    for (size_t i = 0; i < count; ++i) {
        uint32_t p = x[i], q = y[i];
        p = add(p, murmur(q ^ k0), a);
        q = add(q, murmur(p ^ k1), b);
        p = add(p, murmur(q ^ k2), a);
        q = add(q, murmur(p ^ k3), b);
        p = add(p, murmur(q ^ k4), a);
        q = add(q, murmur(p ^ k5), b);
        out[i] = static_cast<int64_t>(static_cast<uint64_t>(p) * b + q);
    }
}

using Rounds = void (*)(const uint32_t*, const uint32_t*, size_t, uint32_t, uint32_t, const uint32_t*, int64_t*);

void rounds_portable(const uint32_t* x, const uint32_t* y, size_t count, uint32_t a, uint32_t b, const uint32_t* keys,
                     int64_t* out) {
    rounds(x, y, count, a, b, keys, out);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void rounds_avx2(const uint32_t* x, const uint32_t* y, size_t count, uint32_t a,
                                                 uint32_t b, const uint32_t* keys, int64_t* out) {
    rounds(x, y, count, a, b, keys, out);
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) void rounds_avx512(const uint32_t* x, const uint32_t* y,
                                                                                size_t count, uint32_t a, uint32_t b,
                                                                                const uint32_t* keys, int64_t* out) {
    rounds(x, y, count, a, b, keys, out);
}
#endif

// 70, 220 and 500 M/s on one EPYC core: plain x86-64 has no 32-bit multiply of four lanes.
Rounds fastest() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
        return rounds_avx512;
    if (__builtin_cpu_supports("avx2")) return rounds_avx2;
#endif
    return rounds_portable;
}

uint64_t ceil_sqrt(uint64_t n) {  // n <= 2^62
    uint64_t root = static_cast<uint64_t>(std::sqrt(static_cast<double>(n)));
    while (root * root >= n && root > 0) --root;
    while (root * root < n) ++root;
    return root;
}

// Fisher-Yates with one counter draw per position: entry i swaps with one of 0..i.
std::vector<int32_t> shuffled(uint64_t n, uint64_t key) {
    std::vector<int32_t> table(n);
    for (uint64_t i = 0; i < n; ++i) table[i] = static_cast<int32_t>(i);
    for (uint64_t i = n - 1; i > 0; --i) std::swap(table[i], table[((fold(key, i) >> 32) * (i + 1)) >> 32]);
    return table;
}

void check_positions(const int64_t* positions, size_t count, uint64_t n) {
    bool outside = false;
    for (size_t i = 0; i < count; ++i) outside |= static_cast<uint64_t>(positions[i]) >= n;
    if (!outside) return;
    const auto [low, high] = std::minmax_element(positions, positions + count);
    throw std::out_of_range("positions " + std::to_string(*low) + ".." + std::to_string(*high) +
                            " are outside the order of " + std::to_string(n) + " samples");
}

uint64_t checked_size(uint64_t n) {
    if (n == 0 || n > Order::kMaxSize)
        throw std::invalid_argument("the order of " + std::to_string(n) + " samples: expected 1..2**62");
    return n;
}

}  // namespace

void check_range(uint64_t start, size_t count, uint64_t n) {
    if (start > n || count > n - start)
        throw std::out_of_range("positions from " + std::to_string(start) + ", " + std::to_string(count) +
                                " of them, are outside the order of " + std::to_string(n) + " samples");
}

Order::Order(uint64_t n, uint64_t key) : n_(checked_size(n)) {
    if (n < kTableBelow) {
        table_ = shuffled(n, key);
        return;
    }
    b_ = static_cast<uint32_t>(ceil_sqrt(n));
    a_ = static_cast<uint32_t>((n + b_ - 1) / b_);
    reciprocal_ = ~0ull / b_;
    for (int r = 0; r < kRounds; ++r) keys_[r] = static_cast<uint32_t>(fold(key, static_cast<uint64_t>(r)));
}

uint64_t Order::step(uint64_t position) const {
    const uint32_t x = static_cast<uint32_t>(position / b_), y = static_cast<uint32_t>(position % b_);
    int64_t out;
    rounds(&x, &y, 1, a_, b_, keys_, &out);
    return static_cast<uint64_t>(out);
}

uint64_t Order::operator()(uint64_t position) const {
    int64_t id = static_cast<int64_t>(position);
    at(&id, 1, &id);
    return static_cast<uint64_t>(id);
}

void Order::finish(uint32_t* x, uint32_t* y, size_t count, int64_t* out, bool portable) const {
    static const Rounds best = fastest();
    (portable ? rounds_portable : best)(x, y, count, a_, b_, keys_, out);
    bool outside = false;
    for (size_t i = 0; i < count; ++i) outside |= static_cast<uint64_t>(out[i]) >= n_;
    if (!outside) return;
    for (size_t i = 0; i < count; ++i)  // cycle walking; a * b - n < b, so few need it
        while (static_cast<uint64_t>(out[i]) >= n_) out[i] = static_cast<int64_t>(step(static_cast<uint64_t>(out[i])));
}

void Order::at(const int64_t* positions, size_t count, int64_t* out, bool portable) const {
    check_positions(positions, count, n_);
    if (!table_.empty()) {
        for (size_t i = 0; i < count; ++i) out[i] = table_[static_cast<size_t>(positions[i])];
        return;
    }
    uint32_t x[kTile], y[kTile];
    for (size_t first = 0; first < count; first += kTile) {
        const size_t tile = std::min(kTile, count - first);
        for (size_t i = 0; i < tile; ++i) {
            const uint64_t p = static_cast<uint64_t>(positions[first + i]);
            // p < 2^62, so the product with floor((2^64 - 1) / b) is short of p / b by less than 1/4.
            uint64_t q = static_cast<uint64_t>((static_cast<unsigned __int128>(p) * reciprocal_) >> 64);
            uint64_t rest = p - q * b_;
            const bool one_more = rest >= b_;
            x[i] = static_cast<uint32_t>(q + one_more);
            y[i] = static_cast<uint32_t>(rest - (one_more ? b_ : 0));
        }
        finish(x, y, tile, out + first, portable);
    }
}

void Order::range(uint64_t start, size_t count, int64_t* out, bool portable) const {
    check_range(start, count, n_);
    if (!table_.empty()) {
        std::copy_n(table_.begin() + static_cast<std::ptrdiff_t>(start), count, out);
        return;
    }
    uint32_t x[kTile], y[kTile];
    uint32_t high = static_cast<uint32_t>(start / b_), low = static_cast<uint32_t>(start % b_);
    for (size_t first = 0; first < count; first += kTile) {
        const size_t tile = std::min(kTile, count - first);
        for (size_t i = 0; i < tile;) {
            const uint32_t run = static_cast<uint32_t>(std::min<size_t>(tile - i, b_ - low));
            for (uint32_t j = 0; j < run; ++j) {
                x[i + j] = high;
                y[i + j] = low + j;
            }
            i += run;
            low += run;
            if (low == b_) {
                low = 0;
                ++high;
            }
        }
        finish(x, y, tile, out + first, portable);
    }
}

BlockOrder::BlockOrder(uint64_t n, uint64_t key, uint64_t block, uint64_t open)
    : n_(checked_size(n)), key_(key), block_(block) {
    if (block == 0 || open == 0 || block > Order::kMaxSize / open)
        throw std::invalid_argument("block order: block " + std::to_string(block) + ", open " + std::to_string(open) +
                                    "; expected both >= 1 and a window of at most 2**62 samples");
    span_ = block * open;
    blocks_ = (n - 1) / block + 1;
    missing_ = blocks_ * block - n;
    const uint64_t full = n / block;
    if (full) full_.emplace_back(full, fold(key, 0));
    short_slot_ = blocks_;  // no block is short
    if (missing_) short_slot_ = static_cast<uint64_t>((static_cast<unsigned __int128>(fold(key, 1)) * blocks_) >> 64);
}

BlockOrder::Window BlockOrder::window(uint64_t position) const {
    const uint64_t holder = short_slot_ / (span_ / block_);  // the window that holds the short block, if any
    const bool later = missing_ && position >= (holder + 1) * span_ - missing_;
    const uint64_t number = (position + (later ? missing_ : 0)) / span_;
    const uint64_t start = number * span_ - (missing_ && number > holder ? missing_ : 0);
    const uint64_t slots = std::min(span_, blocks_ * block_ - number * span_);
    return {number, start, slots - (missing_ && number == holder ? missing_ : 0)};
}

BlockOrder::Open BlockOrder::open(uint64_t position) const {
    const Window w = window(position);
    Open open{w, Order(w.size, fold(key_, 2 + w.number)), {}};
    const uint64_t first = w.number * (span_ / block_), slots = std::min(span_ / block_, blocks_ - first);
    if (slots > kMostStarts) return open;
    for (uint64_t slot = first; slot < first + slots; ++slot) open.starts.push_back(block_at(slot) * block_);
    return open;
}

uint64_t BlockOrder::block_at(uint64_t slot) const {
    return slot == short_slot_ ? blocks_ - 1 : full_[0](slot - (slot > short_slot_));
}

uint64_t BlockOrder::sample(const Open& open, uint64_t place) const {
    const uint64_t first = open.window.number * (span_ / block_);
    if (missing_ && short_slot_ - first < span_ / block_ && place >= (short_slot_ - first + 1) * block_ - missing_)
        place += missing_;
    const uint64_t slot = place / block_, within = place - slot * block_;
    return within + (open.starts.empty() ? block_at(first + slot) * block_ : open.starts[slot]);
}

void BlockOrder::at(const int64_t* positions, size_t count, int64_t* out) const {
    check_positions(positions, count, n_);
    std::vector<Open> last;  // the window of the position before: neighbours mostly share it
    for (size_t i = 0; i < count; ++i) {
        const uint64_t p = static_cast<uint64_t>(positions[i]);
        if (last.empty() || p - last[0].window.start >= last[0].window.size) last.assign(1, open(p));
        out[i] = static_cast<int64_t>(sample(last[0], last[0].order(p - last[0].window.start)));
    }
}

void BlockOrder::range(uint64_t start, size_t count, int64_t* out) const {
    check_range(start, count, n_);
    for (size_t done = 0; done < count;) {
        const Open now = open(start + done);
        const uint64_t from = start + done - now.window.start;
        const size_t some = static_cast<size_t>(std::min<uint64_t>(count - done, now.window.size - from));
        now.order.range(from, some, out + done);
        for (size_t i = done; i < done + some; ++i)
            out[i] = static_cast<int64_t>(sample(now, static_cast<uint64_t>(out[i])));
        done += some;
    }
}

}  // namespace vtrain
