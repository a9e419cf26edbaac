// The arithmetic of sampling, for CUDA and for the host: single roundings in a fixed order and integers, so that all
// give the same bits as the torch backend (kernels/vkernels/sampling.py). Host files that include it need
// fp-contract=off, or a machine with fused multiply-add would round once where the others round twice.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define VK_BOTH __host__ __device__ inline
#else
#define VK_BOTH inline
#endif

namespace sampling {

#ifdef __CUDA_ARCH__
VK_BOTH float add(float a, float b) { return __fadd_rn(a, b); }
VK_BOTH float sub(float a, float b) { return __fsub_rn(a, b); }
VK_BOTH float mul(float a, float b) { return __fmul_rn(a, b); }
#else
VK_BOTH float add(float a, float b) { return a + b; }
VK_BOTH float sub(float a, float b) { return a - b; }
VK_BOTH float mul(float a, float b) { return a * b; }
#endif

template <class To, class From>
VK_BOTH To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    memcpy(&to, &x, sizeof to);
    return to;
}

// What turns logits into scores; see sample_logits.
struct Setting {
    float guidance, penalty, inverse_penalty, inverse_temperature;

    VK_BOTH float penalised(float x) const { return mul(x, x < 0 ? penalty : inverse_penalty); }
    VK_BOTH float guided(float x, float u) const {
        return x == -INFINITY || u == -INFINITY ? -INFINITY : add(mul(sub(x, u), guidance), u);
    }
    VK_BOTH float tempered(float x) const { return mul(x, inverse_temperature); }
};

// floor(2^40 e^x) for x <= 0, to about 2^-22 of it.
VK_BOTH uint64_t weight(float x) {
    if (!(x > -30.0f)) return 0;  // below 2^-43
    const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, half to even
    const float n = sub(add(mul(x, 1.44269504f), shifter), shifter);
    // ln 2 in two parts: the first has 10 bits, so its product is exact.
    float r = sub(x, mul(n, 0.693359375f));
    r = add(r, mul(n, 2.12194440e-4f));
    float p = 1.0f / 5040;
    p = add(mul(p, r), 1.0f / 720);
    p = add(mul(p, r), 1.0f / 120);
    p = add(mul(p, r), 1.0f / 24);
    p = add(mul(p, r), 1.0f / 6);
    p = add(mul(p, r), 0.5f);
    p = add(mul(p, r), 1.0f);
    p = add(mul(p, r), 1.0f);
    return static_cast<uint64_t>(mul(p, bits_as<float>((static_cast<int32_t>(n) + 127 + 40) << 23)));
}

// Unsigned integers in the order of the floats; 0.0f and -0.0f are one.
VK_BOTH uint32_t key_of(float x) {
    const uint32_t bits = bits_as<uint32_t>(add(x, 0.0f));
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
VK_BOTH float float_of(uint32_t key) {
    return bits_as<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The least weight of tokens that reaches the share `top_p` of the total.
VK_BOTH uint64_t share(uint64_t total, double top_p) {
    return static_cast<uint64_t>(ceil(static_cast<double>(total) * top_p));
}

// Philox4x32-10 with key `seed` and counter (step, key): the first two words, the second one above.
VK_BOTH uint64_t philox(uint64_t seed, uint64_t step, uint64_t key) {
    uint32_t c0 = static_cast<uint32_t>(step), c1 = static_cast<uint32_t>(step >> 32);
    uint32_t c2 = static_cast<uint32_t>(key), c3 = static_cast<uint32_t>(key >> 32);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u, b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
        c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(b);
        c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(a);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return static_cast<uint64_t>(c1) << 32 | c0;
}

}  // namespace sampling
