// AdamW and the sum of squares on a run of one tensor. Included once per instruction set by adamw.cpp.
// Plain loops over blocks that stay in the first-level cache: the compiler makes vectors of them.

// Elements i .. i + n as floats: where they are, or widened into `block`.
VK_INLINE float* floats(void* from, int kind, int64_t i, int64_t n, float* block) {
    if (kind == kFloat) return static_cast<float*>(from) + i;
    const uint16_t* half = static_cast<const uint16_t*>(from) + i;
    for (int64_t j = 0; j < n; ++j) {
        const uint32_t bits = static_cast<uint32_t>(half[j]) << 16;
        std::memcpy(block + j, &bits, 4);
    }
    return block;
}

// float -> bf16 after adding `add(j)` to what is cut off; NaN stays NaN.
template <class Add>
VK_INLINE void narrow(const float* from, int64_t n, uint16_t* to, const Add& add) {
    for (int64_t j = 0; j < n; ++j) {
        uint32_t bits;
        std::memcpy(&bits, from + j, 4);
        const uint32_t rounded = (bits + add(j, bits)) >> 16;
        to[j] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    }
}

VK_INLINE void narrow_to_nearest(const float* from, int64_t n, uint16_t* to) {
    narrow(from, n, to, [](int64_t, uint32_t bits) { return 0x7fffu + ((bits >> 16) & 1u); });
}

// words[4 g .. 4 g + 3] = Philox 4x32-10 of the counters (first + g, tensor, step), for g < groups <= kBlock / 4.
VK_INLINE void philox(uint64_t seed, uint64_t first, uint32_t tensor, uint32_t step, int64_t groups, uint32_t* words) {
    uint32_t four[4][kBlock / 4];  // word by word, so that the rounds become vectors
    for (int64_t g = 0; g < groups; ++g) {
        uint32_t a = static_cast<uint32_t>(first + g), b = static_cast<uint32_t>((first + g) >> 32), c = tensor, d = step;
        uint32_t k = static_cast<uint32_t>(seed), l = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const uint64_t x = static_cast<uint64_t>(a) * 0xD2511F53u, y = static_cast<uint64_t>(c) * 0xCD9E8D57u;
            a = static_cast<uint32_t>(y >> 32) ^ b ^ k;
            b = static_cast<uint32_t>(y);
            c = static_cast<uint32_t>(x >> 32) ^ d ^ l;
            d = static_cast<uint32_t>(x);
            k += 0x9E3779B9u;
            l += 0xBB67AE85u;
        }
        four[0][g] = a;
        four[1][g] = b;
        four[2][g] = c;
        four[3][g] = d;
    }
    for (int64_t g = 0; g < groups; ++g)
        for (int w = 0; w < 4; ++w) words[4 * g + w] = four[w][g];
}

VK_INLINE void update(const AdamW& s, float decay, int64_t n, float* __restrict p, const float* __restrict g,
                      float* __restrict m, float* __restrict v) {
    const float scale = s.scale, size = s.size, root = s.root, eps = s.eps;
    const float rest1 = 1 - s.beta1, beta2 = s.beta2, rest2 = 1 - s.beta2;
    for (int64_t j = 0; j < n; ++j) {
        const float x = g[j] * scale;
        m[j] += (x - m[j]) * rest1;
        v[j] = v[j] * beta2 + x * x * rest2;
        p[j] = p[j] * decay - size * m[j] / (std::sqrt(v[j]) / root + eps);
    }
}

// Elements [begin, end) of one tensor; begin is a multiple of 4, as neighbours share their random words.
inline void adamw_run(const AdamW& s, const AdamWTensor& t, int64_t begin, int64_t end) {
    alignas(64) float grads[kBlock], avgs[kBlock], squares[kBlock];
    alignas(64) uint32_t words[kBlock];
    for (int64_t i = begin; i < end; i += kBlock) {
        const int64_t n = end - i < kBlock ? end - i : kBlock;
        float *p = static_cast<float*>(t.p) + i, *m = floats(t.m, s.avg_kind, i, n, avgs);
        float* v = floats(t.v, s.square_kind, i, n, squares);
        update(s, 1 - s.lr * t.decay, n, p, floats(t.g, s.grad_kind, i, n, grads), m, v);
        if (m == avgs || v == squares) philox(s.seed, i / 4, t.index, s.step, (n + 3) / 4, words);
        if (m == avgs) narrow(m, n, static_cast<uint16_t*>(t.m) + i, [&](int64_t j, uint32_t) { return words[j] & 0xffffu; });
        if (v == squares) narrow(v, n, static_cast<uint16_t*>(t.v) + i, [&](int64_t j, uint32_t) { return words[j] >> 16; });
        if (t.c) narrow_to_nearest(p, n, static_cast<uint16_t*>(t.c) + i);
    }
}

// The sum of squares of elements [begin, end), added in the same order whatever runs it.
inline double squares_run(void* from, int kind, int64_t begin, int64_t end) {
    constexpr int64_t kLanes = 32;
    alignas(64) float block[kBlock];
    float lanes[kLanes] = {};
    for (int64_t i = begin; i < end; i += kBlock) {
        const int64_t n = end - i < kBlock ? end - i : kBlock;
        const float* x = floats(from, kind, i, n, block);
        int64_t j = 0;
        for (; j + kLanes <= n; j += kLanes)
            for (int64_t l = 0; l < kLanes; ++l) lanes[l] += x[j + l] * x[j + l];
        for (int64_t l = 0; j + l < n; ++l) lanes[l] += x[j + l] * x[j + l];
    }
    double sum = 0;
    for (float lane : lanes) sum += lane;
    return sum;
}
