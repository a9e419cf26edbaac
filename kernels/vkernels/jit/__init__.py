"""The Triton kernels, one file per op, each with its launches. `vkernels.registry.jit` imports them when first called.

Rules of the house for a kernel: load, then cast to the accumulation dtype (`ACC`, float64 in gradient checks); row
offsets in int64; every element of an output written; no atomics where the order of additions would show.
"""
