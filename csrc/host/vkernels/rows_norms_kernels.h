// RMSNorm, LayerNorm, and RMSNorm of heads with their rotary embedding. Included once per instruction set by
// rows_norms.cpp. Each handles rows [begin, end); gradients of parameters are added to sums of these rows' own.
#include "vkernels/rows_lanes.h"

template <class T>
void rms_norm_forward(const RmsNorm<T>& p, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const T* x = p.x + i * p.stride;
        T* y = p.y + i * p.C;
        Vec<T> squares = {};
        over_lanes<T>(p.C, [&](int64_t d, auto at) VK_BODY {
            Vec<T> v = at.load(x + d);
            squares += v * v;
        });
        const T r = 1 / std::sqrt(sum_lanes<T>(squares) / p.C + p.eps);
        p.rstd[i] = r;
        over_lanes<T>(p.C, [&](int64_t d, auto at) VK_BODY { at.store(y + d, at.load(x + d) * r * at.load(p.weight + d)); });
    }
}

// dx = r (g - x^ mean(g x^)) with x^ = x r, g = dy * weight; plus the gradient of the stream where there is one.
template <class T>
void rms_norm_backward(const RmsNorm<T>& p, int64_t begin, int64_t end, T* dweight) {
    for (int64_t i = begin; i < end; ++i) {
        const T *x = p.x + i * p.stride, *dy = p.dy + i * p.dy_stride;
        const T* dstream = p.dstream ? p.dstream + i * p.dstream_stride : nullptr;
        T* dx = p.dx + i * p.C;
        const T r = p.rstd[i];
        Vec<T> dots = {};
        over_lanes<T>(p.C, [&](int64_t d, auto at) VK_BODY {
            Vec<T> product = at.load(dy + d) * (at.load(x + d) * r);
            at.store(dweight + d, at.load(dweight + d) + product);
            dots += product * at.load(p.weight + d);
        });
        const T mean = sum_lanes<T>(dots) / p.C;
        over_lanes<T>(p.C, [&](int64_t d, auto at) VK_BODY {
            Vec<T> grad = (at.load(dy + d) * at.load(p.weight + d) - at.load(x + d) * r * mean) * r;
            if (dstream) grad += at.load(dstream + d);
            at.store(dx + d, grad);
        });
    }
}

template <class T>
void layer_norm_forward(const LayerNorm<T>& p, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const T* x = p.x + i * p.stride;
        T* y = p.y + i * p.C;
        Vec<T> sum = {}, squares = {};
        over_lanes<T>(p.C, [&](int64_t d, auto at) VK_BODY { sum += at.load(x + d); });
        const T mean = sum_lanes<T>(sum) / p.C;
        // The centred row is kept in y: the lanes past its end must not count in the variance, and there they are 0.
        over_lanes<T>(p.C, [&](int64_t d, auto at) VK_BODY { at.store(y + d, at.load(x + d) - mean); });
        over_lanes<T>(p.C, [&](int64_t d, auto at) VK_BODY {
            Vec<T> v = at.load(y + d);
            squares += v * v;
        });
        const T r = 1 / std::sqrt(sum_lanes<T>(squares) / p.C + p.eps);
        p.mean[i] = mean;
        p.rstd[i] = r;
        over_lanes<T>(p.C, [&](int64_t d, auto at) VK_BODY {
            at.store(y + d, at.load(y + d) * r * at.load(p.weight + d) + at.load(p.bias + d));
        });
    }
}

// dx = r (g - mean(g) - x^ mean(g x^)) with x^ = (x - mean) r, g = dy * weight.
template <class T>
void layer_norm_backward(const LayerNorm<T>& p, int64_t begin, int64_t end, T* dweight, T* dbias) {
    for (int64_t i = begin; i < end; ++i) {
        const T *x = p.x + i * p.stride, *dy = p.dy + i * p.dy_stride;
        T* dx = p.dx + i * p.C;
        const T m = p.mean[i], r = p.rstd[i];
        Vec<T> sum = {}, dots = {};
        over_lanes<T>(p.C, [&](int64_t d, auto at) VK_BODY {
            Vec<T> grad = at.load(dy + d), product = grad * ((at.load(x + d) - m) * r), w = at.load(p.weight + d);
            at.store(dweight + d, at.load(dweight + d) + product);
            at.store(dbias + d, at.load(dbias + d) + grad);
            sum += grad * w;
            dots += product * w;
        });
        const T mean = sum_lanes<T>(sum) / p.C, slope = sum_lanes<T>(dots) / p.C;
        over_lanes<T>(p.C, [&](int64_t d, auto at) VK_BODY {
            Vec<T> xhat = (at.load(x + d) - m) * r;
            at.store(dx + d, (at.load(dy + d) * at.load(p.weight + d) - mean - xhat * slope) * r);
        });
    }
}

// Each head of D elements: divided by its root mean square, times weight, then element i turned with element i + D / 2.
template <class T>
void norm_rope_forward(const NormRope<T>& p, int64_t begin, int64_t end) {
    const int64_t half = p.D / 2;
    for (int64_t i = begin; i < end; ++i) {
        const T *cosine = p.cosine + i * half, *sine = p.sine + i * half;
        for (int64_t h = 0; h < p.H; ++h) {
            const T *a = p.x + i * p.stride + h * p.D, *b = a + half;
            T *ya = p.y + (i * p.H + h) * p.D, *yb = ya + half;
            Vec<T> squares = {};
            over_lanes<T>(half, [&](int64_t d, auto at) VK_BODY {
                Vec<T> left = at.load(a + d), right = at.load(b + d);
                squares += left * left + right * right;
            });
            const T r = 1 / std::sqrt(sum_lanes<T>(squares) / p.D + p.eps);
            p.rstd[i * p.H + h] = r;
            over_lanes<T>(half, [&](int64_t d, auto at) VK_BODY {
                Vec<T> c = at.load(cosine + d), s = at.load(sine + d);
                Vec<T> left = at.load(a + d) * r * at.load(p.weight + d);
                Vec<T> right = at.load(b + d) * r * at.load(p.weight + half + d);
                at.store(ya + d, left * c - right * s);
                at.store(yb + d, right * c + left * s);
            });
        }
    }
}

template <class T>
void norm_rope_backward(const NormRope<T>& p, int64_t begin, int64_t end, T* dweight) {
    const int64_t half = p.D / 2;
    for (int64_t i = begin; i < end; ++i) {
        const T *cosine = p.cosine + i * half, *sine = p.sine + i * half;
        for (int64_t h = 0; h < p.H; ++h) {
            const T *a = p.x + i * p.stride + h * p.D, *b = a + half;
            const T *ga = p.dy + i * p.dy_stride + h * p.D, *gb = ga + half;
            T *da = p.dx + (i * p.H + h) * p.D, *db = da + half;
            const T r = p.rstd[i * p.H + h];
            Vec<T> dots = {};
            auto add = [&](int64_t d, auto at, const Vec<T>& grad, const T* x, T* dx) VK_BODY {
                Vec<T> product = grad * (at.load(x) * r), w = at.load(p.weight + d);
                at.store(dweight + d, at.load(dweight + d) + product);
                dots += product * w;
                at.store(dx, grad * w);
            };
            over_lanes<T>(half, [&](int64_t d, auto at) VK_BODY {
                Vec<T> c = at.load(cosine + d), s = at.load(sine + d), left = at.load(ga + d), right = at.load(gb + d);
                add(d, at, left * c + right * s, a + d, da + d);
                add(half + d, at, right * c - left * s, b + d, db + d);
            });
            const T mean = sum_lanes<T>(dots) / p.D;
            over_lanes<T>(p.D, [&](int64_t d, auto at) VK_BODY {
                at.store(da + d, (at.load(da + d) - at.load(a + d) * r * mean) * r);
            });
        }
    }
}
