// Row-wise kernels: RMSNorm, SwiGLU, rotary embedding and the sum of rows by index. Included once per instruction set by
// rows.cpp. Each handles rows [begin, end).

// body(offset, width) over 0..n in vectors; the last one may be partial.
template <class T, class Whole, class Part>
VK_INLINE void over_lanes(int64_t n, const Whole& whole, const Part& part) {
    int64_t d = 0;
    for (; d + Lanes<T>::n <= n; d += Lanes<T>::n) whole(d);
    if (d < n) part(d, n - d);
}

template <class T>
void rms_norm_forward(const RmsNorm<T>& p, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const T* x = p.x + i * p.stride;
        T* y = p.y + i * p.C;
        Vec<T> squares = {};
        over_lanes<T>(
            p.C,
            [&](int64_t d) {
                Vec<T> v = load(x + d);
                squares += v * v;
            },
            [&](int64_t d, int64_t n) {
                Vec<T> v = load_some(x + d, n);
                squares += v * v;
            });
        const T r = 1 / std::sqrt(sum_lanes<T>(squares) / p.C + p.eps);
        p.rstd[i] = r;
        over_lanes<T>(
            p.C, [&](int64_t d) { store(y + d, load(x + d) * r * load(p.weight + d)); },
            [&](int64_t d, int64_t n) { store_some(y + d, load_some(x + d, n) * r * load_some(p.weight + d, n), n); });
    }
}

// dx = r (g - x^ mean(g x^)) with x^ = x r, g = dy * weight; dweight of these rows is the sum of dy x^.
template <class T>
void rms_norm_backward(const RmsNorm<T>& p, int64_t begin, int64_t end, T* dweight) {
    for (int64_t i = begin; i < end; ++i) {
        const T *x = p.x + i * p.stride, *dy = p.dy + i * p.C;
        T* dx = p.dx + i * p.C;
        const T r = p.rstd[i];
        Vec<T> dots = {};
        over_lanes<T>(
            p.C,
            [&](int64_t d) {
                Vec<T> product = load(dy + d) * (load(x + d) * r);
                store(dweight + d, load(dweight + d) + product);
                dots += product * load(p.weight + d);
            },
            [&](int64_t d, int64_t n) {
                Vec<T> product = load_some(dy + d, n) * (load_some(x + d, n) * r);
                store_some(dweight + d, load_some(dweight + d, n) + product, n);
                dots += product * load_some(p.weight + d, n);
            });
        const T mean = sum_lanes<T>(dots) / p.C;
        over_lanes<T>(
            p.C,
            [&](int64_t d) { store(dx + d, (load(dy + d) * load(p.weight + d) - load(x + d) * r * mean) * r); },
            [&](int64_t d, int64_t n) {
                Vec<T> g = load_some(dy + d, n) * load_some(p.weight + d, n);
                store_some(dx + d, (g - load_some(x + d, n) * r * mean) * r, n);
            });
    }
}

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
        auto value = [&](const Vec<T>& g, const Vec<T>& u, Vec<T>& out) {
            sigmoid<T>(g, out);
            out = g * out * u;
        };
        Vec<T> out;
        over_lanes<T>(
            p.F,
            [&](int64_t d) {
                value(load(gate + d), load(up + d), out);
                store(y + d, out);
            },
            [&](int64_t d, int64_t n) {
                value(load_some(gate + d, n), load_some(up + d, n), out);
                store_some(y + d, out, n);
            });
    }
}

// d silu(g) / dg = s (1 + g (1 - s))
template <class T>
void swiglu_backward(const SwiGlu<T>& p, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const T *gate = p.gate + i * p.gate_stride, *up = p.up + i * p.up_stride, *dy = p.dy + i * p.F;
        T *dgate = p.dgate + i * p.F, *dup = p.dup + i * p.F;
        auto slopes = [&](const Vec<T>& g, const Vec<T>& u, const Vec<T>& grad, Vec<T>& to_gate, Vec<T>& to_up) {
            Vec<T> s;
            sigmoid<T>(g, s);
            to_up = grad * g * s;
            to_gate = grad * u * s * (1 + g * (1 - s));
        };
        Vec<T> a, b;
        over_lanes<T>(
            p.F,
            [&](int64_t d) {
                slopes(load(gate + d), load(up + d), load(dy + d), a, b);
                store(dgate + d, a);
                store(dup + d, b);
            },
            [&](int64_t d, int64_t n) {
                slopes(load_some(gate + d, n), load_some(up + d, n), load_some(dy + d, n), a, b);
                store_some(dgate + d, a, n);
                store_some(dup + d, b, n);
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
            over_lanes<T>(
                half,
                [&](int64_t d) {
                    Vec<T> c = load(cosine + d), s = load(sine + d) * p.sign, left = load(a + d), right = load(b + d);
                    store(ya + d, left * c - right * s);
                    store(yb + d, right * c + left * s);
                },
                [&](int64_t d, int64_t n) {
                    Vec<T> c = load_some(cosine + d, n), s = load_some(sine + d, n) * p.sign;
                    Vec<T> left = load_some(a + d, n), right = load_some(b + d, n);
                    store_some(ya + d, left * c - right * s, n);
                    store_some(yb + d, right * c + left * s, n);
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
        over_lanes<T>(
            end - begin, [&](int64_t d) { store(sum + d, load(sum + d) + load(row + d)); },
            [&](int64_t d, int64_t n) { store_some(sum + d, load_some(sum + d, n) + load_some(row + d, n), n); });
    }
}
