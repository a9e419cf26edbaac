// Includes the file named by VK_KERNELS once per instruction set, each time in a namespace of its own, so that one
// binary runs anywhere and uses what the machine has. No include guard: every kernel file includes it once.
// The standard headers must come before it, or they would be compiled for the wider instruction set.
#pragma GCC diagnostic ignored "-Wpsabi"  // every function on vectors is inlined: none crosses a call
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VK_MULTI_ISA 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")
namespace avx512 {
#define VK_TILE_ROWS 8
#include "vkernels/vec.h"
#include VK_KERNELS
#undef VK_TILE_ROWS
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define VK_TILE_ROWS 4
#include "vkernels/vec.h"
#include VK_KERNELS
#undef VK_TILE_ROWS
}  // namespace avx2
#pragma GCC pop_options
#endif

namespace baseline {
#define VK_TILE_ROWS 4
#include "vkernels/vec.h"
#include VK_KERNELS
#undef VK_TILE_ROWS
}  // namespace baseline

// The widest version of a function template that this machine runs: VK_PICK(forward<float>).
#if defined(VK_MULTI_ISA)
#define VK_PICK(...)                                                                 \
    (isa_level() == 2 ? &avx512::__VA_ARGS__ : isa_level() == 1 ? &avx2::__VA_ARGS__ \
                                                                : &baseline::__VA_ARGS__)
#else
#define VK_PICK(...) (&baseline::__VA_ARGS__)
#endif
