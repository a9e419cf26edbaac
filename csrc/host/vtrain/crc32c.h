// crc32c of bytes. `value` is the crc of what came before, 0 at the start.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vtrain {

uint32_t crc32c(uint32_t value, const uint8_t* p, size_t n);
uint32_t crc32c_portable(uint32_t value, const uint8_t* p, size_t n);  // for machines without SSE4.2
uint32_t crc32c_lanes(uint32_t value, const uint8_t* p, size_t n);     // for those without VPCLMULQDQ

// Of A+B from the crcs of A and B and the length of B.
uint32_t crc32c_combine(uint32_t first, uint32_t second, uint64_t second_bytes);

}  // namespace vtrain
