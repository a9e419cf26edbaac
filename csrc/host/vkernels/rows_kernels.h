// Row-wise kernels: SwiGLU, rotary embedding and the sum of rows by index. Included once per instruction set by rows.cpp.
// Each handles rows [begin, end).
#include "vkernels/rows_lanes.h"

template <class T>
VK_INLINE void sigmoid(const Vec<T>& x, Vec<T>& s) {
    s = -x;
    exponential(s);
    s = 1 / (1 + s);
}

template <class T>
void swiglu_forward(const SwiGlu<T>& p, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const T *gate = p.gate + i * p.gate_stride, *up = p.up + i * p.up_stride;
        T* y = p.y + i * p.F;
        over_lanes<T>(p.F, [&](int64_t d, auto at) VK_BODY {
            Vec<T> g = at.load(gate + d), s;
            sigmoid<T>(g, s);
            at.store(y + d, g * s * at.load(up + d));
        });
    }
}

// d silu(g) / dg = s (1 + g (1 - s))
template <class T>
void swiglu_backward(const SwiGlu<T>& p, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const T *gate = p.gate + i * p.gate_stride, *up = p.up + i * p.up_stride, *dy = p.dy + i * p.dy_stride;
        T *dgate = p.dgate + i * p.dgate_stride, *dup = p.dup + i * p.dup_stride;
        over_lanes<T>(p.F, [&](int64_t d, auto at) VK_BODY {
            Vec<T> g = at.load(gate + d), grad = at.load(dy + d), s;
            sigmoid<T>(g, s);
            at.store(dup + d, grad * g * s);
            at.store(dgate + d, grad * at.load(up + d) * s * (1 + g * (1 - s)));
        });
    }
}

template <class T>
void rope_rows(const Rope<T>& p, int64_t begin, int64_t end) {
    const int64_t half = p.D / 2;
    for (int64_t i = begin; i < end; ++i) {
        const T *cosine = p.cosine + i * half, *sine = p.sine + i * half;
        for (int64_t h = 0; h < p.H; ++h) {
            const T *a = p.x + i * p.stride + h * p.D, *b = a + half;
            T *ya = p.y + (i * p.H + h) * p.D, *yb = ya + half;
            over_lanes<T>(half, [&](int64_t d, auto at) VK_BODY {
                Vec<T> c = at.load(cosine + d), s = at.load(sine + d) * p.sign;
                Vec<T> left = at.load(a + d), right = at.load(b + d);
                at.store(ya + d, left * c - right * s);
                at.store(yb + d, right * c + left * s);
            });
        }
    }
}

// sums[id - base] += rows[i] for columns [begin, end), in row order: one order of summation, whatever the threads.
template <class T>
void add_rows(const AddRows<T>& p, int64_t begin, int64_t end) {
    for (int64_t i = 0; i < p.N; ++i) {
        const int64_t id = p.ids[i] - p.base;
        if (id < 0 || id >= p.size) continue;
        const T* row = p.rows + i * p.C + begin;
        T* sum = p.sums + id * p.C + begin;
        over_lanes<T>(end - begin,
                      [&](int64_t d, auto at) VK_BODY { at.store(sum + d, at.load(sum + d) + at.load(row + d)); });
    }
}
