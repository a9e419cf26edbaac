// Sampling: one block per row goes from logits to a token, without sorting and without memory of its own.
//
// It gives the ids of the torch backend bit by bit: see common/sampling_math.h. Weights are integers, so that their sums
// have no order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/sampling_math.h"

#define VK_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kWarp = 32, kThreads = 1024, kWarps = kThreads / kWarp;
constexpr int kDigits = 3, kDigit = 11;  // a 32-bit key as digits of 11, 11 and 10 bits
constexpr int kBins = 1 << kDigit;
static_assert(kWarps == kWarp, "one warp takes in what each warp left");
constexpr int kFlight = 4;  // scores that a thread loads before it uses the first
constexpr unsigned kAll = 0xffffffffu;
using u64 = unsigned long long;
using namespace sampling;

enum Type : int { kFloat32, kBfloat16, kFloat16 };

}  // namespace

// What the launcher takes; vkernels/cuda.py has the same fields in the same order.
struct VkSampling {
    const void *logits, *uncond;  // [rows, ...] of `type`, rows `stride` apart; uncond may be null
    const uint8_t* seen;          // bool[rows, ...], may be null
    const int64_t *step, *keys;   // a scalar; [rows], may be null
    int64_t* ids;                 // [rows]
    float* logprob;               // [rows]
    int64_t logits_stride, uncond_stride, seen_stride;
    int64_t seed;
    double top_p;
    sampling::Setting setting;    // 4 floats
    int32_t rows, lo, hi, top_k, type, greedy, device;
};

namespace {

struct Shared {
    u64 sums[kWarps];
    u64 pick;  // where one thread tells the others what it found
    u64 above;
    uint32_t low[kBins], high[kBins];  // a histogram of 64-bit sums, its halves added with carry
};

__device__ float load(const float* p) { return *p; }
__device__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ float load(const __half* p) { return __half2float(*p); }

// One row: scores and weights of the columns [lo, hi), counted from 0.
template <class T>
struct Row {
    const T *logits, *uncond;
    const uint8_t* seen;
    Setting setting;
    int n;

    __device__ float score(int i) const {
        float x = load(logits + i);
        if (seen && seen[i]) x = setting.penalised(x);
        if (uncond) x = setting.guided(x, load(uncond + i));
        return setting.tempered(x);
    }
};

// visit(score, i) for i = first, first + step, ... below end.
template <class T, class Visit>
__device__ void each_score(const Row<T>& row, int first, int end, int step, const Visit& visit) {
    for (int i = first; i < end; i += kFlight * step) {
        float x[kFlight];
#pragma unroll
        for (int j = 0; j < kFlight; ++j) x[j] = i + j * step < end ? row.score(i + j * step) : 0;
#pragma unroll
        for (int j = 0; j < kFlight; ++j)
            if (i + j * step < end) visit(x[j], i + j * step);
    }
}

template <class T, class Op>
__device__ T warp_reduce(T x, const Op& op) {
    for (int d = kWarp / 2; d; d /= 2) x = op(x, __shfl_xor_sync(kAll, x, d));
    return x;
}

// The reduction of x over the block, the same in every thread.
template <class Op>
__device__ u64 block_reduce(u64 x, Shared& s, const Op& op) {
    x = warp_reduce(x, op);
    __syncthreads();  // whoever still reads the sums of before
    if (threadIdx.x % kWarp == 0) s.sums[threadIdx.x / kWarp] = x;
    __syncthreads();
    return warp_reduce(s.sums[threadIdx.x % kWarp], op);
}
struct Add {
    __device__ u64 operator()(u64 a, u64 b) const { return a + b; }
};
struct Max {
    __device__ u64 operator()(u64 a, u64 b) const { return a > b ? a : b; }
};

// Inclusive sums over the lanes of a warp.
__device__ u64 warp_scan(u64 x) {
    for (int d = 1; d < kWarp; d *= 2) {
        const u64 other = __shfl_up_sync(kAll, x, d);
        if (static_cast<int>(threadIdx.x) % kWarp >= d) x += other;
    }
    return x;
}

// Adds with carry by two 32-bit atomics: in shared memory, 64-bit ones are loops of compare-and-swap.
__device__ void add(Shared& s, uint32_t bin, u64 w) {
    const uint32_t low = static_cast<uint32_t>(w), before = atomicAdd(&s.low[bin], low);
    const uint32_t high = static_cast<uint32_t>(w >> 32) + (before + low < before);
    if (high) atomicAdd(&s.high[bin], high);
}

// The bin in which the sum from the top reaches `target` (1 or more, and at most the sum of all); s.above = the sum
// over it. Every thread takes kBins / kThreads bins, thread 0 the highest ones. To be called after a barrier.
__device__ uint32_t crossing(Shared& s, u64 target) {
    constexpr int each = kBins / kThreads;
    const int top = kBins - 1 - static_cast<int>(threadIdx.x) * each;
    u64 own = 0;
    for (int i = 0; i < each; ++i) own += static_cast<u64>(s.high[top - i]) << 32 | s.low[top - i];
    const u64 scanned = warp_scan(own);
    if (threadIdx.x % kWarp == kWarp - 1) s.sums[threadIdx.x / kWarp] = scanned;
    __syncthreads();
    u64 above = scanned - own;
    for (int w = 0; w < static_cast<int>(threadIdx.x) / kWarp; ++w) above += s.sums[w];
    if (above < target && target <= above + own) {  // true in one thread
        for (int i = 0; i < each; ++i) {
            const u64 bin = static_cast<u64>(s.high[top - i]) << 32 | s.low[top - i];
            if (target <= above + bin) {
                s.pick = top - i;
                s.above = above;
                break;
            }
            above += bin;
        }
    }
    __syncthreads();
    return static_cast<uint32_t>(s.pick);
}

// The highest score such that it and all higher ones have at least `target` together, where each score counts
// measure(score): the radix selection of a key, digit by digit.
template <class T, class Measure>
__device__ float select(const Row<T>& row, Shared& s, u64 target, const Measure& measure) {
    uint32_t prefix = 0;
    int below = 32;  // bits under the digits that are known
    for (int digit = 0; digit < kDigits; ++digit) {
        const int known = below, bits = min(kDigit, below);
        below -= bits;
        for (int i = threadIdx.x; i < kBins; i += kThreads) s.low[i] = s.high[i] = 0;
        __syncthreads();
        each_score(row, threadIdx.x, row.n, kThreads, [&](float x, int) {
            const uint32_t key = key_of(x);
            if (static_cast<u64>(key) >> known != prefix) return;  // in 64 bits a shift by 32 gives 0
            const u64 w = measure(x);
            if (w) add(s, key >> below & ((1u << bits) - 1), w);
        });
        __syncthreads();
        prefix = prefix << bits | crossing(s, target);
        target -= s.above;
    }
    return float_of(prefix);
}

// The first column at which the summed weights exceed random * (their total) / 2^64, its own weight and the total.
// Each round cuts the range into a part per warp and goes on in the part that holds the target.
template <class T, class Weigh>
__device__ int draw(const Row<T>& row, Shared& s, u64 random, const Weigh& weigh, u64& own, u64& total) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int begin = 0, size = row.n;
    u64 target = 0;
    total = 0;
    do {
        const int part = ((size + kWarps - 1) / kWarps + kWarp - 1) / kWarp * kWarp;
        const int end = min(begin + size, begin + (warp + 1) * part);
        u64 sum = 0;
        each_score(row, begin + warp * part + lane, end, kWarp, [&](float x, int) { sum += weigh(x); });
        sum = warp_reduce(sum, Add());
        __syncthreads();
        if (lane == 0) s.sums[warp] = sum;
        __syncthreads();
        const u64 upto = warp_scan(s.sums[lane]);
        if (!total) {
            total = __shfl_sync(kAll, upto, kWarps - 1);
            target = __umul64hi(total, random);
        }
        const int chosen = __ffs(__ballot_sync(kAll, upto > target)) - 1;
        if (chosen > 0) target -= __shfl_sync(kAll, upto, chosen - 1);
        size = min(part, size - chosen * part);
        begin += chosen * part;
    } while (size > kWarp);
    const u64 w = lane < size ? weigh(row.score(begin + lane)) : 0;
    const u64 upto = warp_scan(w);
    const int chosen = __ffs(__ballot_sync(kAll, upto > target)) - 1;
    own = __shfl_sync(kAll, w, chosen);
    return begin + chosen;
}

template <class T>
__device__ Row<T> row_of(const VkSampling& p, int r) {
    const T* uncond = static_cast<const T*>(p.uncond);
    return {static_cast<const T*>(p.logits) + r * p.logits_stride + p.lo,
            uncond ? uncond + r * p.uncond_stride + p.lo : nullptr,
            p.seen ? p.seen + r * p.seen_stride + p.lo : nullptr,
            p.setting,
            p.hi - p.lo};
}

template <class T>
__global__ void __launch_bounds__(kThreads) sample(const VkSampling p) {
    __shared__ Shared s;
    const int r = blockIdx.x;
    const Row<T> row = row_of<T>(p, r);
    // The highest score, and at equal ones the lowest column; a score that is not below infinity beats all.
    u64 best = 0;
    each_score(row, threadIdx.x, row.n, kThreads, [&](float x, int i) {
        best = Max()(best, static_cast<u64>(x < INFINITY ? key_of(x) : kAll) << 32 | (kAll - i));
    });
    best = block_reduce(best, s, Max());
    const uint32_t top = best >> 32;
    if (top == kAll || top == key_of(-INFINITY)) {
        if (threadIdx.x == 0) p.ids[r] = p.lo, p.logprob[r] = NAN;
        return;
    }
    if (p.greedy) {
        if (threadIdx.x == 0) p.ids[r] = p.lo + (kAll - static_cast<uint32_t>(best)), p.logprob[r] = 0;
        return;
    }
    const float peak = float_of(top);
    float least = -INFINITY;
    auto weigh = [&](float x) { return x >= least ? weight(sub(x, peak)) : 0; };
    if (p.top_k > 0 && p.top_k < row.n) least = select(row, s, p.top_k, [](float) { return u64(1); });
    if (p.top_p < 1) {
        u64 total = 0;
        each_score(row, threadIdx.x, row.n, kThreads, [&](float x, int) { total += weigh(x); });
        total = block_reduce(total, s, Add());
        least = select(row, s, share(total, p.top_p), weigh);
    }
    u64 own, total;
    const u64 random = philox(p.seed, *p.step, p.keys ? p.keys[r] : r);
    const int column = draw(row, s, random, weigh, own, total);
    if (threadIdx.x == 0) {
        p.ids[r] = p.lo + column;
        p.logprob[r] = static_cast<float>(log(static_cast<double>(own) / static_cast<double>(total)));
    }
}

template <class T>
cudaError_t launch(VkSampling p, void* stream) {
    void* arguments[] = {&p};
    return cudaLaunchKernel(sample<T>, dim3(p.rows), dim3(kThreads), arguments, 0, static_cast<cudaStream_t>(stream));
}

// Makes a device the current one for a while: torch has another runtime, but the same current device under it.
struct OnDevice {
    int before = -1;
    cudaError_t error;

    explicit OnDevice(int device) {
        error = cudaGetDevice(&before);
        if (!error && before != device) error = cudaSetDevice(device);
    }
    ~OnDevice() {
        if (before >= 0) cudaSetDevice(before);
    }
};

}  // namespace

// Samples on the stream; 0 or a CUDA error. It waits for nothing and allocates nothing, so graphs can capture it.
VK_EXPORT int vk_sample(const VkSampling* p, void* stream) {
    const OnDevice there(p->device);
    if (there.error) return there.error;
    switch (p->type) {
        case kFloat32: return launch<float>(*p, stream);
        case kBfloat16: return launch<__nv_bfloat16>(*p, stream);
        case kFloat16: return launch<__half>(*p, stream);
    }
    return cudaErrorInvalidValue;
}

// For the caller to compare its struct with.
VK_EXPORT int vk_sampling_bytes() { return sizeof(VkSampling); }

// 0 if the library has code that the device runs, or a CUDA error. It loads all kernels: loading one at its first launch
// would be too late inside the capture of a graph.
VK_EXPORT int vk_ready(int device) {
    const OnDevice there(device);
    cudaFuncAttributes found;
    cudaError_t error = there.error;
    if (!error) error = cudaFuncGetAttributes(&found, sample<float>);
    if (!error) error = cudaFuncGetAttributes(&found, sample<__nv_bfloat16>);
    if (!error) error = cudaFuncGetAttributes(&found, sample<__half>);
    return error;
}

VK_EXPORT const char* vk_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
