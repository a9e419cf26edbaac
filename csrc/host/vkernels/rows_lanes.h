// Loops over the elements of a row in vectors. Included once per instruction set, by the kernel files.

// How a body reads and writes the vector at hand: all of it, or the first n lanes.
template <class T>
struct Whole {
    VK_INLINE Vec<T> load(const T* p) const {
        Vec<T> v;
        std::memcpy(&v, p, sizeof(v));
        return v;
    }
    VK_INLINE void store(T* p, const Vec<T>& v) const { std::memcpy(p, &v, sizeof(v)); }
};

template <class T>
struct Part {
    int64_t n;
    VK_INLINE Vec<T> load(const T* p) const { return load_some(p, n); }
    VK_INLINE void store(T* p, const Vec<T>& v) const { store_some(p, v, n); }
};

// body(offset, at) over 0..n in vectors; the last one may be partial: its other lanes load as 0 and are not stored.
template <class T, class Body>
VK_INLINE void over_lanes(int64_t n, const Body& body) {
    int64_t d = 0;
    for (; d + Lanes<T>::n <= n; d += Lanes<T>::n) body(d, Whole<T>{});
    if (d < n) body(d, Part<T>{n - d});
}
