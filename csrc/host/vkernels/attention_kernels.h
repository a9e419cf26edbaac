// Packed attention of one document and one key head at a time, exact softmax over blocks of keys. Included once per
// instruction set by attention.cpp. All operands are first copied to aligned scratch rows whose length is a multiple of
// a vector, so the products below have no edges; their surplus rows and columns are zero or masked.

constexpr int64_t kBlockQ = 32;   // queries of a block
constexpr int64_t kBlockK = 128;  // keys of a block: 16 KB of float scores

template <class T>
VK_INLINE int64_t pad_lanes(int64_t n) {
    return (n + Lanes<T>::n - 1) / Lanes<T>::n * Lanes<T>::n;
}
VK_INLINE int64_t pad_rows(int64_t n) { return (n + VK_TILE_ROWS - 1) / VK_TILE_ROWS * VK_TILE_ROWS; }

// C[M, N] += A[M, K] B[K, N]. A's element (m, k) is a[m * am + k * ak]; M a multiple of the tile, N of a vector.
template <class T>
VK_INLINE void multiply_add(int64_t M, int64_t N, int64_t K, const T* a, int64_t am, int64_t ak, const T* b, int64_t ldb,
                            T* c, int64_t ldc) {
    for (int64_t n = 0; n < N; n += Lanes<T>::n)
        for (int64_t m = 0; m < M; m += VK_TILE_ROWS) {
            Vec<T> sum[VK_TILE_ROWS];
            T* at = c + m * ldc + n;
            const T* left = a + m * am;
#pragma GCC unroll 8
            for (int r = 0; r < VK_TILE_ROWS; ++r) sum[r] = load(at + r * ldc);
            for (int64_t k = 0; k < K; ++k) {
                Vec<T> right = load(b + k * ldb + n);
#pragma GCC unroll 8
                for (int r = 0; r < VK_TILE_ROWS; ++r) sum[r] += left[r * am + k * ak] * right;
            }
#pragma GCC unroll 8
            for (int r = 0; r < VK_TILE_ROWS; ++r) store(at + r * ldc, sum[r]);
        }
}

// Rows [n, D] with a stride into [pad_rows(n), Dp], times `factor`; the surplus is zero.
template <class T>
VK_INLINE void pack_rows(const T* from, int64_t stride, int64_t n, int64_t D, int64_t Dp, T factor, T* to) {
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t d = 0; d < D; ++d) to[i * Dp + d] = from[i * stride + d] * factor;
        for (int64_t d = D; d < Dp; ++d) to[i * Dp + d] = 0;
    }
    std::memset(to + n * Dp, 0, (pad_rows(n) - n) * Dp * sizeof(T));
}

// Rows [n, D] with a stride into their transpose [D, ld]; columns from n on are zero.
template <class T>
VK_INLINE void pack_columns(const T* from, int64_t stride, int64_t n, int64_t D, int64_t ld, T* to) {
    for (int64_t d = 0; d < D; ++d) std::memset(to + d * ld + n, 0, (ld - n) * sizeof(T));
    for (int64_t j = 0; j < n; ++j)
        for (int64_t d = 0; d < D; ++d) to[d * ld + j] = from[j * stride + d];
}

// The keys [lo, hi) of the document's query i, counted from the document's first key; empty ones have hi <= lo.
struct Interval {
    int64_t lo, hi;
};

template <class T>
VK_INLINE Interval visible(const Problem<T>& p, const Piece& piece, int64_t i) {
    int64_t lo = 0, hi = piece.keys - piece.queries + i + 1;
    if (p.kv_lo) lo = std::max<int64_t>(0, p.kv_lo[piece.q0 + i] - piece.k0);
    if (p.kv_hi) hi = std::min<int64_t>(piece.keys, p.kv_hi[piece.q0 + i] - piece.k0);
    return {lo, std::max(hi, lo)};
}

// The visible intervals of a block's queries, and their union.
template <class T>
VK_INLINE Interval block_intervals(const Problem<T>& p, const Piece& piece, int64_t i0, int64_t n, Interval* each) {
    Interval all{piece.keys, 0};
    for (int64_t i = 0; i < n; ++i) {
        each[i] = visible(p, piece, i0 + i);
        if (each[i].hi > each[i].lo) all = {std::min(all.lo, each[i].lo), std::max(all.hi, each[i].hi)};
    }
    return all;
}

// Scores outside [lo, hi) become -infinity, so that their exponential is exactly 0.
template <class T>
VK_INLINE void mask_row(T* row, int64_t lo, int64_t hi, int64_t width) {
    const T never = -std::numeric_limits<T>::infinity();
    for (int64_t j = 0; j < std::min(lo, width); ++j) row[j] = never;
    for (int64_t j = std::max<int64_t>(hi, 0); j < width; ++j) row[j] = never;
}

// One block of scores to probabilities relative to the running maximum; rescales what the row has summed so far.
template <class T>
VK_INLINE void softmax_row(T* row, int64_t width, T* out, int64_t Dp, T& maximum, T& total) {
    constexpr int L = Lanes<T>::n;
    Vec<T> top = load(row);
    for (int64_t j = L; j < width; j += L) {
        Vec<T> x = load(row + j);
        top = x > top ? x : top;
    }
    const T before = maximum, now = std::max(before, max_lanes<T>(top));
    Vec<T> sum = {};
    for (int64_t j = 0; j < width; j += L) {
        Vec<T> e = load(row + j) - now;
        exponential(e);
        store(row + j, e);
        sum += e;
    }
    const T shrink = std::exp(before - now);  // 0 on the first block
    maximum = now;
    total = total * shrink + sum_lanes<T>(sum);
    if (shrink != 1)
        for (int64_t d = 0; d < Dp; d += L) store(out + d, load(out + d) * shrink);
}

template <class T>
void forward_piece(const Problem<T>& p, const Piece& piece, int64_t key_head, Scratch<T>& scratch) {
    const int64_t D = p.D, Dp = pad_lanes<T>(D), group = p.Hq / p.Hk, n_keys = piece.keys;
    const int64_t ldk = pad_lanes<T>(n_keys);
    T* kt = scratch.get(D * ldk + n_keys * Dp + 2 * kBlockQ * Dp + kBlockQ * kBlockK + 2 * kBlockQ);
    T* v = kt + D * ldk;
    T* q = v + n_keys * Dp;
    T* o = q + kBlockQ * Dp;
    T* s = o + kBlockQ * Dp;
    T* maximum = s + kBlockQ * kBlockK;
    T* total = maximum + kBlockQ;
    pack_columns(p.k + piece.k0 * p.k_stride + key_head * D, p.k_stride, n_keys, D, ldk, kt);
    for (int64_t j = 0; j < n_keys; ++j) {
        const T* from = p.v + (piece.k0 + j) * p.v_stride + key_head * D;
        for (int64_t d = 0; d < Dp; ++d) v[j * Dp + d] = d < D ? from[d] : 0;
    }
    Interval each[kBlockQ];
    for (int64_t h = key_head * group; h < (key_head + 1) * group; ++h)
        for (int64_t i0 = 0; i0 < piece.queries; i0 += kBlockQ) {
            const int64_t n = std::min(kBlockQ, piece.queries - i0), M = pad_rows(n);
            const Interval all = block_intervals(p, piece, i0, n, each);
            pack_rows(p.q + (piece.q0 + i0) * p.q_stride + h * D, p.q_stride, n, D, Dp, p.scale, q);
            std::memset(o, 0, M * Dp * sizeof(T));
            std::fill(maximum, maximum + n, -std::numeric_limits<T>::infinity());
            std::fill(total, total + n, T(0));
            for (int64_t j0 = all.lo / Lanes<T>::n * Lanes<T>::n; j0 < all.hi; j0 += kBlockK) {
                const int64_t used = std::min(kBlockK, all.hi - j0), N = pad_lanes<T>(used);
                std::memset(s, 0, M * kBlockK * sizeof(T));
                multiply_add<T>(M, N, D, q, Dp, 1, kt + j0, ldk, s, kBlockK);
                for (int64_t i = 0; i < n; ++i) {
                    T* row = s + i * kBlockK;
                    if (std::max(each[i].lo, j0) >= std::min(each[i].hi, j0 + used)) {
                        std::memset(row, 0, N * sizeof(T));
                        continue;
                    }
                    mask_row(row, each[i].lo - j0, each[i].hi - j0, N);
                    softmax_row(row, N, o + i * Dp, Dp, maximum[i], total[i]);
                }
                multiply_add<T>(M, Dp, used, s, kBlockK, 1, v + j0 * Dp, Dp, o, Dp);
            }
            for (int64_t i = 0; i < n; ++i) {
                const int64_t row = piece.q0 + i0 + i;
                const T inverse = total[i] > 0 ? 1 / total[i] : 0;
                T* to = p.out + (row * p.Hq + h) * D;
                for (int64_t d = 0; d < D; ++d) to[d] = o[i * Dp + d] * inverse;
                p.lse[h * p.Tq + row] = maximum[i] + std::log(total[i]);
            }
        }
}

template <class T>
void backward_piece(const Problem<T>& p, const Piece& piece, int64_t key_head, Scratch<T>& scratch) {
    const int64_t D = p.D, Dp = pad_lanes<T>(D), group = p.Hq / p.Hk, n_keys = piece.keys;
    // Gradients of keys are summed in whole blocks of rows, which may reach past the last key.
    const int64_t ldk = pad_lanes<T>(n_keys), rows_k = n_keys + kBlockK;
    T* kt = scratch.get(2 * D * ldk + 3 * rows_k * Dp + 3 * kBlockQ * Dp + 2 * kBlockQ * kBlockK + kBlockQ);
    T* vt = kt + D * ldk;
    T* k = vt + D * ldk;
    T* dk = k + rows_k * Dp;
    T* dv = dk + rows_k * Dp;
    T* q = dv + rows_k * Dp;
    T* g = q + kBlockQ * Dp;
    T* dq = g + kBlockQ * Dp;
    T* s = dq + kBlockQ * Dp;
    T* ds = s + kBlockQ * kBlockK;
    T* delta = ds + kBlockQ * kBlockK;
    const T* k_rows = p.k + piece.k0 * p.k_stride + key_head * D;
    pack_columns(k_rows, p.k_stride, n_keys, D, ldk, kt);
    pack_columns(p.v + piece.k0 * p.v_stride + key_head * D, p.v_stride, n_keys, D, ldk, vt);
    pack_rows(k_rows, p.k_stride, n_keys, D, Dp, T(1), k);
    std::memset(dk, 0, 2 * rows_k * Dp * sizeof(T));
    Interval each[kBlockQ];
    for (int64_t h = key_head * group; h < (key_head + 1) * group; ++h)
        for (int64_t i0 = 0; i0 < piece.queries; i0 += kBlockQ) {
            const int64_t n = std::min(kBlockQ, piece.queries - i0), M = pad_rows(n);
            const Interval all = block_intervals(p, piece, i0, n, each);
            const int64_t first = piece.q0 + i0;
            pack_rows(p.q + first * p.q_stride + h * D, p.q_stride, n, D, Dp, p.scale, q);
            pack_rows(p.grad_out + (first * p.Hq + h) * D, p.Hq * D, n, D, Dp, T(1), g);
            std::memset(dq, 0, M * Dp * sizeof(T));
            for (int64_t i = 0; i < n; ++i) {
                const T* o = p.saved_out + ((first + i) * p.Hq + h) * D;
                T sum = 0;
                for (int64_t d = 0; d < D; ++d) sum += o[d] * g[i * Dp + d];
                delta[i] = sum;
            }
            for (int64_t j0 = all.lo / Lanes<T>::n * Lanes<T>::n; j0 < all.hi; j0 += kBlockK) {
                const int64_t used = std::min(kBlockK, all.hi - j0), N = pad_lanes<T>(used);
                std::memset(s, 0, M * kBlockK * sizeof(T));
                std::memset(ds, 0, M * kBlockK * sizeof(T));
                multiply_add<T>(M, N, D, q, Dp, 1, kt + j0, ldk, s, kBlockK);
                multiply_add<T>(M, N, D, g, Dp, 1, vt + j0, ldk, ds, kBlockK);
                for (int64_t i = 0; i < n; ++i) {
                    T *probability = s + i * kBlockK, *slope = ds + i * kBlockK;
                    if (std::max(each[i].lo, j0) >= std::min(each[i].hi, j0 + used)) {
                        std::memset(probability, 0, N * sizeof(T));
                        std::memset(slope, 0, N * sizeof(T));
                        continue;
                    }
                    mask_row(probability, each[i].lo - j0, each[i].hi - j0, N);
                    const T lse = p.lse[h * p.Tq + first + i];
                    for (int64_t j = 0; j < N; j += Lanes<T>::n) {
                        Vec<T> e = load(probability + j) - lse;
                        exponential(e);
                        store(probability + j, e);
                        store(slope + j, e * (load(slope + j) - delta[i]));
                    }
                }
                const int64_t keys = pad_rows(used);
                // q carries the scale: dk needs it, dq gets it when it is written.
                multiply_add<T>(keys, Dp, n, s, 1, kBlockK, g, Dp, dv + j0 * Dp, Dp);
                multiply_add<T>(keys, Dp, n, ds, 1, kBlockK, q, Dp, dk + j0 * Dp, Dp);
                multiply_add<T>(M, Dp, used, ds, kBlockK, 1, k + j0 * Dp, Dp, dq, Dp);
            }
            for (int64_t i = 0; i < n; ++i)
                for (int64_t d = 0; d < D; ++d) p.dq[((first + i) * p.Hq + h) * D + d] = dq[i * Dp + d] * p.scale;
        }
    for (int64_t j = 0; j < n_keys; ++j)
        for (int64_t d = 0; d < D; ++d) {
            const int64_t at = ((piece.k0 + j) * p.Hk + key_head) * D + d;
            p.dk[at] = dk[j * Dp + d];
            p.dv[at] = dv[j * Dp + d];
        }
}

