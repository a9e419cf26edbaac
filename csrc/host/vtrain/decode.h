// Stored token ids to int32. Plain C++ over mapped bytes: no Python here, so a fuzzer can drive it.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vtrain {

// A stream of ids: `low_bytes` (1, 2, 4) bytes of each id in one plane, `high_bits` (0, 1, 2) more of it in a second
// one, where those of id i start at bit i * high_bits, the lowest bit of a byte first. u16+1 is {.., 2, 1}.
struct TokenStore {
    const uint8_t* low = nullptr;
    const uint8_t* high = nullptr;
    uint64_t count = 0;
    int low_bytes = 0;
    int high_bits = 0;
};

// The lowest and the highest of some ids as unsigned numbers; of none `low` is the larger.
struct Bounds {
    uint32_t low = 0xFFFFFFFF, high = 0;
    void add(uint32_t a, uint32_t b) {
        low = std::min(low, a);
        high = std::max(high, b);
    }
};

// Ids first..first+count-1 to out[count], and their bounds. The caller has checked the range. Both planes must be
// followed by 64 readable bytes; nothing is written behind out[count - 1].
Bounds decode(const TokenStore& store, uint64_t first, uint64_t count, int32_t* out);

// Decode with "portable", "avx2" or "avx512" from now on, nullptr = the best of this machine; false where it has none.
bool force_isa(const char* name);

}  // namespace vtrain
