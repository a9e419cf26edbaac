// What the host kernels share: numpy views with checks, scratch memory, threads, and the choice of instruction set.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace py = pybind11;

// The instruction set in use: 2 AVX-512, 1 AVX2 with FMA, 0 what every machine of this kind has.
inline int widest_isa() {
    int found = 0;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found = 1;
    if (found && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        found = 2;
#endif
    return found;
}
inline int& isa_level() {
    static int level = widest_isa();
    return level;
}

// Run work(item, thread) for every item; items are handed out in order, one at a time. Work must not throw.
template <class Work>
void parallel_for(int64_t items, int threads, const Work& work) {
    if (threads > items) threads = static_cast<int>(items);
    if (threads <= 1) {
        for (int64_t i = 0; i < items; ++i) work(i, 0);
        return;
    }
    std::atomic<int64_t> next{0};
    auto run = [&](int thread) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(i, thread);
    };
    std::vector<std::thread> others;
    others.reserve(threads - 1);
    for (int t = 1; t < threads; ++t) others.emplace_back(run, t);
    run(0);
    for (auto& t : others) t.join();
}

// 64-byte aligned memory that only grows.
template <class T>
class Scratch {
  public:
    // Always inlined: a copy compiled for one instruction set must not serve the others.
    __attribute__((always_inline)) T* get(size_t n) {
        if (n > size_) {
            memory_.reset(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64)));
            if (!memory_) throw std::bad_alloc();
            size_ = n;
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> memory_;
    size_t size_ = 0;
};

// A contiguous array of T with the given number of dimensions. Nothing is converted or copied.
template <class T>
using Dense = py::array_t<T, py::array::c_style>;

inline void require(bool ok, const char* what) {
    if (!ok) throw py::value_error(what);
}
