// Ids of 17 and 18 bits as they are stored: a plane of their low 16 bits and a plane of the 1 or 2 bits above.
// The bits of token i start at bit (i * P) % 8 of byte i * P / 8, the lowest bit first. Plain C++.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

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
        const uint32_t mask = (1u << bits_) - 1;
        const size_t group = static_cast<size_t>(8 / bits_);
        size_t i = 0;
        for (; i < n && used_; ++i) push((static_cast<uint32_t>(ids[i]) >> 16) & mask);
        for (; i + group <= n; i += group) {
            uint32_t byte = 0;
            for (size_t j = 0; j < group; ++j)
                byte |= ((static_cast<uint32_t>(ids[i + j]) >> 16) & mask) << (j * static_cast<size_t>(bits_));
            data_.push_back(static_cast<uint8_t>(byte));
        }
        for (; i < n; ++i) push((static_cast<uint32_t>(ids[i]) >> 16) & mask);
    }

    const std::vector<uint8_t>& data() const { return data_; }

  private:
    void push(uint32_t value) {
        if (used_ == 0) data_.push_back(0);
        data_.back() = static_cast<uint8_t>(data_.back() | value << used_);
        used_ = (used_ + bits_) & 7;
    }

    int bits_;
    int used_ = 0;  // bits of the last byte that are taken, 0 = all
    std::vector<uint8_t> data_;
};

}  // namespace vtrain
