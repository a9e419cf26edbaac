// Decoding of token ids, once per instruction set, chosen at run time.
#include "vtrain/decode.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // of its own intrinsics: gcc.gnu.org/PR105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#endif

namespace vtrain {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "shards are little endian and read in place");

// (low plane at the first id, high plane, bit of the first id in it, ids, out)
using Decoder = Bounds (*)(const uint8_t*, const uint8_t*, uint64_t, uint64_t, int32_t*);

template <int kLow>
uint32_t low_part(const uint8_t* at) {
    uint32_t id = 0;
    std::memcpy(&id, at, kLow);
    return id;
}

template <int kLow, int kHigh>
Bounds decode_portable(const uint8_t* low, const uint8_t* high, uint64_t bit, uint64_t count, int32_t* out) {
    Bounds found;
    for (uint64_t i = 0; i < count; ++i) {
        uint32_t id = low_part<kLow>(low + i * kLow);
        if constexpr (kHigh > 0) {
            const uint64_t at = bit + i * kHigh;  // 1 and 2 divide 8: the bits of an id share a byte
            id |= (static_cast<uint32_t>(high[at / 8]) >> (at % 8) & ((1u << kHigh) - 1)) << 16;
        }
        found.add(id, id);
        out[i] = static_cast<int32_t>(id);
    }
    return found;
}

#if defined(__x86_64__)
// The 32 bits of the high plane from `bit` on.
inline uint32_t bits_at(const uint8_t* high, uint64_t bit) {
    uint64_t word;
    std::memcpy(&word, high + bit / 8, 8);
    return static_cast<uint32_t>(word >> (bit % 8));
}

template <int kLow, int kHigh>
__attribute__((target("avx2"))) Bounds decode_avx2(const uint8_t* low, const uint8_t* high, uint64_t bit,
                                                   uint64_t count, int32_t* out) {
    const __m256i lanes = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(kHigh));
    const __m256i mask = _mm256_set1_epi32((1 << kHigh) - 1);
    __m256i lowest = _mm256_set1_epi32(-1), highest = _mm256_setzero_si256();
    uint64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        __m256i ids;
        if constexpr (kLow == 1)
            ids = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(low + i)));
        else if constexpr (kLow == 2)
            ids = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low + 2 * i)));
        else
            ids = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + 4 * i));
        if constexpr (kHigh > 0) {
            const __m256i word = _mm256_set1_epi32(static_cast<int>(bits_at(high, bit + i * kHigh)));
            const __m256i part = _mm256_and_si256(_mm256_srlv_epi32(word, lanes), mask);
            ids = _mm256_or_si256(ids, _mm256_slli_epi32(part, 16));
        }
        lowest = _mm256_min_epu32(lowest, ids);
        highest = _mm256_max_epu32(highest, ids);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), ids);
    }
    alignas(32) uint32_t lows[8], highs[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lows), lowest);
    _mm256_store_si256(reinterpret_cast<__m256i*>(highs), highest);
    Bounds found = decode_portable<kLow, kHigh>(low + i * kLow, high, bit + i * kHigh, count - i, out + i);
    for (int lane = 0; lane < 8; ++lane) found.add(lows[lane], highs[lane]);
    return found;
}

// 16 ids from id i on; reads behind the last id, within the 64 spare bytes.
template <int kLow, int kHigh>
__attribute__((target("avx512f"), always_inline)) inline __m512i load16(const uint8_t* low, const uint8_t* high,
                                                                        uint64_t bit, uint64_t i) {
    __m512i ids;
    if constexpr (kLow == 1)
        ids = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low + i)));
    else if constexpr (kLow == 2)
        ids = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + 2 * i)));
    else
        ids = _mm512_loadu_si512(low + 4 * i);
    if constexpr (kHigh == 1) {  // the bits are a mask as they are
        const auto set = static_cast<__mmask16>(bits_at(high, bit + i));
        ids = _mm512_mask_or_epi32(ids, set, ids, _mm512_set1_epi32(1 << 16));
    }
    if constexpr (kHigh == 2) {
        const __m512i lanes = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i word = _mm512_set1_epi32(static_cast<int>(bits_at(high, bit + 2 * i)));
        const __m512i part = _mm512_and_si512(_mm512_srlv_epi32(word, lanes), _mm512_set1_epi32(3));
        ids = _mm512_or_si512(ids, _mm512_slli_epi32(part, 16));
    }
    return ids;
}

template <int kLow, int kHigh>
__attribute__((target("avx512f"))) Bounds decode_avx512(const uint8_t* low, const uint8_t* high, uint64_t bit,
                                                        uint64_t count, int32_t* out) {
    __m512i lowest = _mm512_set1_epi32(-1), highest = _mm512_setzero_si512();
    uint64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const __m512i ids = load16<kLow, kHigh>(low, high, bit, i);
        lowest = _mm512_min_epu32(lowest, ids);
        highest = _mm512_max_epu32(highest, ids);
        _mm512_storeu_si512(out + i, ids);
    }
    if (i < count) {
        const auto keep = static_cast<__mmask16>((1u << (count - i)) - 1);
        const __m512i ids = load16<kLow, kHigh>(low, high, bit, i);
        lowest = _mm512_mask_min_epu32(lowest, keep, lowest, ids);
        highest = _mm512_mask_max_epu32(highest, keep, highest, ids);
        _mm512_mask_storeu_epi32(out + i, keep, ids);
    }
    return {_mm512_reduce_min_epu32(lowest), _mm512_reduce_max_epu32(highest)};
}
#endif

struct Decoders {
    const char* name;
    Decoder u8, u16, u16_1, u16_2, u32;
};

constexpr Decoders kPortable{"portable", decode_portable<1, 0>, decode_portable<2, 0>, decode_portable<2, 1>,
                             decode_portable<2, 2>, decode_portable<4, 0>};
#if defined(__x86_64__)
constexpr Decoders kAvx2{"avx2", decode_avx2<1, 0>, decode_avx2<2, 0>, decode_avx2<2, 1>, decode_avx2<2, 2>,
                         decode_avx2<4, 0>};
constexpr Decoders kAvx512{"avx512", decode_avx512<1, 0>, decode_avx512<2, 0>, decode_avx512<2, 1>,
                           decode_avx512<2, 2>, decode_avx512<4, 0>};
#endif

// The decoders of that name, of the best instruction set for nullptr; nullptr where this machine cannot run them.
const Decoders* find(const char* name) {
    const auto wanted = [name](const Decoders& one) { return name == nullptr || !std::strcmp(name, one.name); };
#if defined(__x86_64__)
    if (wanted(kAvx512) && __builtin_cpu_supports("avx512f")) return &kAvx512;
    if (wanted(kAvx2) && __builtin_cpu_supports("avx2")) return &kAvx2;
#endif
    return wanted(kPortable) ? &kPortable : nullptr;
}

std::atomic<const Decoders*>& chosen() {
    static std::atomic<const Decoders*> decoders{find(nullptr)};
    return decoders;
}

}  // namespace

bool force_isa(const char* name) {
    const Decoders* decoders = find(name);
    if (decoders != nullptr) chosen().store(decoders, std::memory_order_relaxed);
    return decoders != nullptr;
}

Bounds decode(const TokenStore& store, uint64_t first, uint64_t count, int32_t* out) {
    const Decoders& d = *chosen().load(std::memory_order_relaxed);
    const Decoder with_bits = store.high_bits == 1 ? d.u16_1 : store.high_bits == 2 ? d.u16_2 : d.u16;
    const Decoder run = store.low_bytes == 1 ? d.u8 : store.low_bytes == 4 ? d.u32 : with_bits;
    return run(store.low + first * static_cast<uint64_t>(store.low_bytes), store.high,
               first * static_cast<uint64_t>(store.high_bits), count, out);
}

}  // namespace vtrain
