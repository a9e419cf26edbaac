// Ids of 17 and 18 bits as they are stored: a plane of their low 16 bits and a plane of the 1 or 2 bits above.
// The bits of token i start at bit (i * P) % 8 of byte i * P / 8, the lowest bit first. Plain C++.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#if defined(__x86_64__)
#include <emmintrin.h>  // SSE2: every x86-64 has it
#endif

namespace vtrain {

// The high bits of one token.
inline uint32_t plane_bits(const uint8_t* plane, int bits, uint64_t token) {
    uint64_t bit = token * static_cast<uint64_t>(bits);
    return (plane[bit >> 3] >> (bit & 7)) & ((1u << bits) - 1);
}

// Collects the high bits of ids that arrive in pieces of any size.
class PlaneBytes {
  public:
    explicit PlaneBytes(int bits) : bits_(bits) {}

    void append(const int32_t* ids, size_t n) {
        size_t i = 0;
        for (; i < n && used_; ++i) push(ids[i]);
        const size_t groups = (n - i) / 8, at = data_.size();
        data_.resize(at + groups * static_cast<size_t>(bits_));
        uint8_t* out = data_.data() + at;  // its own name: what is written to bytes may be anything, the members too
        if (bits_ == 1)
            for (size_t g = 0; g < groups; ++g, i += 8) out[g] = one_bit_of_8(ids + i);
        else
            for (size_t g = 0; g < 2 * groups; ++g, i += 4) out[g] = two_bits_of_4(ids + i);
        for (; i < n; ++i) push(ids[i]);
    }

    // The same, and the low 16 bits to low[n].
    void split(const int32_t* ids, size_t n, uint16_t* low) {
        append(ids, n);
        for (size_t i = 0; i < n; ++i) low[i] = static_cast<uint16_t>(ids[i]);
    }

    const std::vector<uint8_t>& data() const { return data_; }

    // Calls use(bytes, count) with the bytes that no id can change any more and drops them. Who keeps them in pieces
    // pays for no growth of one array, which takes twice as long as all else here.
    template <class Use>
    void drain(Use use) {
        const size_t full = data_.size() - (used_ ? 1 : 0);
        use(data_.data(), full);
        data_.erase(data_.begin(), data_.begin() + static_cast<std::ptrdiff_t>(full));
    }

  private:
    static uint8_t one_bit_of_8(const int32_t* ids) {
#if defined(__x86_64__)
        auto signs = [](const int32_t* four) {
            const __m128i v = _mm_slli_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(four)), 15);
            return _mm_movemask_ps(_mm_castsi128_ps(v));
        };
        return static_cast<uint8_t>(signs(ids) | signs(ids + 4) << 4);
#else
        uint32_t found = 0;
        for (int i = 0; i < 8; ++i) found |= (static_cast<uint32_t>(ids[i]) >> 16 & 1) << i;
        return static_cast<uint8_t>(found);
#endif
    }

    static uint8_t two_bits_of_4(const int32_t* ids) {
        uint32_t found = 0;
        for (int i = 0; i < 4; ++i) found |= (static_cast<uint32_t>(ids[i]) >> 16 & 3) << 2 * i;
        return static_cast<uint8_t>(found);
    }

    void push(int32_t id) {
        const uint32_t value = (static_cast<uint32_t>(id) >> 16) & ((1u << bits_) - 1);
        if (used_ == 0) data_.push_back(0);
        data_.back() = static_cast<uint8_t>(data_.back() | value << used_);
        used_ = (used_ + bits_) & 7;
    }

    int bits_;
    int used_ = 0;  // bits of the last byte that are taken, 0 = all
    std::vector<uint8_t> data_;
};

}  // namespace vtrain
