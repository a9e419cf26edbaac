// Orders of samples that are computed, not stored: keyed permutations of 0..n-1 in integers, the same on every host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace vtrain {

// splitmix64's finaliser and the key fold of vtrain/rng.py.
inline uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

inline uint64_t fold(uint64_t key, uint64_t word) {
    constexpr uint64_t kGamma = 0x9E3779B97F4A7C15ull;
    return mix((key ^ mix(word + kGamma)) + kGamma);
}

// std::out_of_range unless positions start..start+count-1 are among 0..n-1.
void check_range(uint64_t start, size_t count, uint64_t n);

// An alternating Feistel network on Z_a x Z_b with a * b just above n, walked until it lands below n. Below kTableBelow
// samples, where six rounds are not yet uniform, a shuffled table.
class Order {
public:
    static constexpr uint64_t kMaxSize = 1ull << 62;
    static constexpr uint64_t kTableBelow = 4096;
    static constexpr int kRounds = 6;

    Order(uint64_t n, uint64_t key);  // std::invalid_argument unless n is in 1..kMaxSize
    uint64_t size() const { return n_; }

    // out[i] = the sample at positions[i]; std::out_of_range for a position that is not below n. May be in place.
    void at(const int64_t* positions, size_t count, int64_t* out, bool portable = false) const;
    // out[i] = the sample at start + i.
    void range(uint64_t start, size_t count, int64_t* out, bool portable = false) const;
    uint64_t operator()(uint64_t position) const;

private:
    void finish(uint32_t* x, uint32_t* y, size_t count, int64_t* out, bool portable) const;
    uint64_t step(uint64_t position) const;

    uint64_t n_, reciprocal_ = 0;
    uint32_t a_ = 0, b_ = 0;
    uint32_t keys_[kRounds] = {};
    std::vector<int32_t> table_;
};

// For disks and object stores: blocks of `block` consecutive samples in permuted order, `open` of them at a time, and
// the samples of each such window permuted. Closed form, also with a short last block, whose place among the others is
// a draw of its own.
class BlockOrder {
public:
    BlockOrder(uint64_t n, uint64_t key, uint64_t block, uint64_t open);
    uint64_t size() const { return n_; }
    void at(const int64_t* positions, size_t count, int64_t* out) const;
    void range(uint64_t start, size_t count, int64_t* out) const;

private:
    struct Window {
        uint64_t number, start, size;  // start: the position of its first sample
    };
    struct Open {
        Window window;
        Order order;                   // of the samples in its blocks, laid end to end
        std::vector<uint64_t> starts;  // first samples of its blocks; empty when there are more than kMostStarts
    };
    static constexpr uint64_t kMostStarts = 4096;

    Window window(uint64_t position) const;
    Open open(uint64_t position) const;  // the window that holds a position
    uint64_t block_at(uint64_t slot) const;
    uint64_t sample(const Open& open, uint64_t place) const;

    uint64_t n_, key_, block_, span_;  // span: samples of a full window
    uint64_t blocks_, missing_, short_slot_;  // missing: samples that the short block lacks
    std::vector<Order> full_;  // the order of the full blocks; empty when there are none
};

}  // namespace vtrain
