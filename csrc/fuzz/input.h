// What the fuzz targets share: numbers out of a fuzzer's bytes, and claims that end the process where they do not hold.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace fuzz {

inline void claim(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "claim broken: %s\n", what);
    std::abort();
}

// Reads from the front; zeros once the bytes have run out.
class Input {
public:
    Input(const uint8_t* data, size_t size) : at_(data), left_(size) {}

    size_t left() const { return left_; }

    template <class T>
    T number() {
        T value{};
        const size_t n = left_ < sizeof(T) ? left_ : sizeof(T);
        if (n) std::memcpy(&value, at_, n);
        at_ += n;
        left_ -= n;
        return value;
    }

    bool flag() { return number<uint8_t>() & 1; }
    uint64_t below(uint64_t n) { return number<uint32_t>() % n; }
    uint64_t within(uint64_t low, uint64_t high) { return low + below(high - low + 1); }

    // A copy of its own: a read behind its end is seen by the address sanitizer.
    std::vector<uint8_t> bytes(size_t n) {
        n = n < left_ ? n : left_;
        std::vector<uint8_t> taken(at_, at_ + n);
        at_ += n;
        left_ -= n;
        return taken;
    }

private:
    const uint8_t* at_;
    size_t left_;
};

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
