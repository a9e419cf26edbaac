// Runs CUDA kernels on the host, so that a .cu file that g++ compiles with this header does what a GPU would do.
//
// A thread of a block is a fiber. It runs until it meets the others: at __syncthreads() all of the block, at a warp
// function all 32 lanes. Meeting at different lines, or one thread ending while others wait, is an error that the
// launch returns. Between meetings the fibers run one after the other in an order that `emulate_order` sets, in which
// whole warps may fall behind: a result that depends on the order is a race. Blocks run one by one and find shared
// memory as the one before left it.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static
using std::max;
using std::min;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // one fiber runs at a time: the scheduler sets them

namespace emulate {

constexpr unsigned kLanes = 32;
constexpr size_t kStack = 64 << 10;
enum State { kReady, kAtBarrier, kAtWarp, kDone };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    State state;
    int line;        // where it waits
    uint64_t value;  // what it brings to its warp
};

inline std::vector<Fiber> fibers;
inline std::vector<uint64_t> gathered;  // by thread: what the lanes of its warp brought last
inline ucontext_t scheduler;
inline std::function<void()> body;
inline unsigned current;
inline int order = 0;  // 0 ascending, 1 descending, else a seed: a new shuffle and other late warps every round
inline char message[160] = "no error";

inline void wait(State state, int line, uint64_t value = 0) {
    Fiber& self = fibers[current];
    self.state = state, self.line = line, self.value = value;
    swapcontext(&self.context, &scheduler);
}

inline void enter() {
    body();
    fibers[current].state = kDone;
    setcontext(&scheduler);
}

// Lets [begin, end) go on if all of them wait in `state` at one line. -> whether it did.
inline bool release(unsigned begin, unsigned end, State state) {
    for (unsigned t = begin; t < end; ++t)
        if (fibers[t].state != state || fibers[t].line != fibers[begin].line) return false;
    for (unsigned t = begin; t < end; ++t) {
        fibers[t].state = kReady;
        if (state == kAtWarp) gathered[t] = fibers[t].value;
    }
    return true;
}

inline bool stuck() {
    const char* where[] = {"running", "at __syncthreads", "at a warp function", "at its end"};
    for (unsigned t = 1; t < fibers.size(); ++t) {
        const Fiber &a = fibers[t - 1], &b = fibers[t];
        if (a.state == b.state && a.line == b.line) continue;
        std::snprintf(message, sizeof message, "divergence: thread %u is %s, line %d; thread %u is %s, line %d", t - 1,
                      where[a.state], a.line, t, where[b.state], b.line);
        return true;
    }
    return false;
}

inline bool run_block() {
    const unsigned n = blockDim.x;
    fibers.resize(n);
    gathered.resize(n);
    for (Fiber& f : fibers) {
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = kStack;
        f.context.uc_link = nullptr;
        f.state = kReady, f.line = 0;
        makecontext(&f.context, enter, 0);
    }
    std::vector<unsigned> turn(n);
    std::iota(turn.begin(), turn.end(), 0u);
    if (order == 1) std::reverse(turn.begin(), turn.end());
    std::mt19937 random(order);
    uint32_t late = 0;  // warps that sit out 16 rounds, while others go as far as the next barrier
    for (int round = 0;; ++round) {
        if (order > 1) std::shuffle(turn.begin(), turn.end(), random);
        if (order > 1 && round % 16 == 0) late = random();
        bool moved = false;
        for (unsigned t : turn) {
            if (fibers[t].state != kReady) continue;
            moved = true;
            if (late >> t / kLanes & 1) continue;
            current = t, threadIdx.x = t;
            swapcontext(&scheduler, &fibers[t].context);
        }
        for (unsigned t = 0; t < n; t += kLanes) moved |= release(t, min(t + kLanes, n), kAtWarp);
        if (moved || release(0, n, kAtBarrier)) continue;
        return !stuck();  // all are done
    }
}

template <class T>
uint64_t bits(T x) {
    uint64_t out = 0;
    std::memcpy(&out, &x, sizeof x);
    return out;
}

// What lane `from` of the own warp brought; its own if there is no such lane.
template <class T>
T exchange(T x, int from, int line) {
    static_assert(sizeof(T) <= 8);
    wait(kAtWarp, line, bits(x));
    if (from < 0 || from >= static_cast<int>(kLanes)) return x;
    T out;
    std::memcpy(&out, &gathered[current / kLanes * kLanes + from], sizeof out);
    return out;
}

inline int lane() { return current % kLanes; }

inline unsigned ballot(bool x, int line) {
    wait(kAtWarp, line, x);
    unsigned out = 0;
    for (unsigned i = 0; i < kLanes; ++i) out |= static_cast<unsigned>(gathered[current / kLanes * kLanes + i]) << i;
    return out;
}

inline void whole_warp(unsigned mask) {
    if (mask == 0xffffffffu) return;
    std::fprintf(stderr, "emulate.h: warp functions take all 32 lanes here\n");
    std::abort();
}

}  // namespace emulate

#define __syncthreads() emulate::wait(emulate::kAtBarrier, __LINE__)
#define __shfl_sync(mask, x, from) (emulate::whole_warp(mask), emulate::exchange(x, (from) % 32, __LINE__))
#define __shfl_xor_sync(mask, x, d) (emulate::whole_warp(mask), emulate::exchange(x, emulate::lane() ^ (d), __LINE__))
#define __shfl_up_sync(mask, x, d) (emulate::whole_warp(mask), emulate::exchange(x, emulate::lane() - (d), __LINE__))
#define __ballot_sync(mask, x) (emulate::whole_warp(mask), emulate::ballot(x, __LINE__))

template <class T>
T atomicAdd(T* p, T x) {
    const T before = *p;
    *p += x;
    return before;
}

inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned __int128>(a) * b >> 64;
}

struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
    float out;
    std::memcpy(&out, &wide, sizeof out);
    return out;
}
using __half = _Float16;
inline float __half2float(__half x) { return static_cast<float>(x); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure = 719 };
struct cudaFuncAttributes {};
template <class F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, F*) {
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return emulate::message; }

template <class P>
cudaError_t cudaLaunchKernel(void (*kernel)(P), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
    if (!grid.x || block.x % emulate::kLanes) return cudaErrorInvalidValue;
    gridDim = grid, blockDim = block;
    emulate::body = [=] { kernel(*static_cast<P*>(arguments[0])); };
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
        if (!emulate::run_block()) return cudaErrorLaunchFailure;
    return cudaSuccess;
}

extern "C" inline __attribute__((used)) void emulate_order(int order) { emulate::order = order; }
