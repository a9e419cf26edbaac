// Vectors of 64 bytes and the few operations on them that kernels need. Included by foreach_isa.h only.

template <class T>
struct Lanes {
    static constexpr int n = 64 / sizeof(T);
    typedef T vec __attribute__((vector_size(64)));
};
template <class T>
using Vec = typename Lanes<T>::vec;

#define VK_INLINE inline __attribute__((always_inline))
#define VK_BODY __attribute__((always_inline))  // of a lambda on vectors

template <class T>
VK_INLINE Vec<T> load(const T* p) {
    Vec<T> v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

template <class T>
VK_INLINE void store(T* p, const Vec<T>& v) {
    std::memcpy(p, &v, sizeof(v));
}

// The first n < Lanes elements, the rest zero.
template <class T>
VK_INLINE Vec<T> load_some(const T* p, int64_t n) {
    Vec<T> v = {};
    std::memcpy(&v, p, n * sizeof(T));
    return v;
}

template <class T>
VK_INLINE void store_some(T* p, const Vec<T>& v, int64_t n) {
    std::memcpy(p, &v, n * sizeof(T));
}

template <class T>
VK_INLINE T sum_lanes(const Vec<T>& v) {
    T lanes[Lanes<T>::n];
    std::memcpy(lanes, &v, sizeof(v));
    for (int width = Lanes<T>::n / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

template <class T>
VK_INLINE T max_lanes(const Vec<T>& v) {
    T lanes[Lanes<T>::n];
    std::memcpy(lanes, &v, sizeof(v));
    for (int width = Lanes<T>::n / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
}

// x = e^x to about 1 ulp: argument = n ln 2 + r, |r| <= ln(2) / 2, Taylor series of degree 7. 0 below -87, at most e^88.
VK_INLINE void exponential(Vec<float>& x) {
    typedef int32_t Ints __attribute__((vector_size(64)));
    const Vec<float> top = Vec<float>{} + 88.0f;
    x = x > top ? top : x;
    const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    Vec<float> n = (x * 1.44269504f + shifter) - shifter;
    Vec<float> r = x - n * 0.693359375f;  // ln 2 in two parts: the first has 10 bits, so its product is exact
    r = r + n * 2.12194440e-4f;
    Vec<float> p = r * (1.0f / 5040) + (1.0f / 720);
    p = p * r + (1.0f / 120);
    p = p * r + (1.0f / 24);
    p = p * r + (1.0f / 6);
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    Ints bits = (__builtin_convertvector(n, Ints) + 127) << 23;
    Vec<float> power;
    std::memcpy(&power, &bits, sizeof(power));
    const Vec<float> bottom = Vec<float>{} - 87.0f;
    x = x < bottom ? Vec<float>{} : p * power;
}

VK_INLINE void exponential(Vec<double>& x) {
    for (int i = 0; i < Lanes<double>::n; ++i) x[i] = std::exp(x[i]);
}

