// What the row-wise kernels share: rows handed to threads in chunks, and checked pointers into numpy arrays.
#pragma once
#include <algorithm>
#include <vector>

#include "vkernels/host.h"

constexpr int64_t kChunkRows = 256;
constexpr int64_t kBlockRows = 16, kBlockTokens = 4;  // tokens of some 16 heads: 64 rows
constexpr int64_t kWorthThreads = 1 << 20;  // elements; below it, starting a thread costs more than it saves

inline int64_t chunks_of(int64_t rows) { return (rows + kChunkRows - 1) / kChunkRows; }

// work(begin, end) over chunks of rows.
template <class Work>
void over_rows(int64_t rows, int64_t width, int threads, const Work& work) {
    py::gil_scoped_release release;
    parallel_for(chunks_of(rows), rows * width < kWorthThreads ? 1 : threads,
                 [&](int64_t c, int) { work(c * kChunkRows, std::min(rows, (c + 1) * kChunkRows)); });
}

// work(begin, end, sums) likewise, adding to sums[width]; total[width] is what all add up to. Blocks of `block` rows are
// summed on their own, blocks to chunks and chunks to the total, always in order: the same for any number of threads,
// and short chains of additions, as float32 wants (one chain of 8192 errs by 1e-6).
template <class T, class Work>
void over_rows_summing(int64_t rows, int64_t elements, int64_t width, int64_t block, int threads, T* total,
                       const Work& work) {
    std::vector<T> partial(chunks_of(rows) * 2 * width, T(0));  // of each chunk, its sum and that of the block at hand
    over_rows(rows, elements, threads, [&](int64_t begin, int64_t end) {
        T *chunk = partial.data() + begin / kChunkRows * 2 * width, *sums = chunk + width;
        for (int64_t i = begin; i < end; i += block) {
            std::fill(sums, sums + width, T(0));
            work(i, std::min(end, i + block), sums);
            for (int64_t d = 0; d < width; ++d) chunk[d] += sums[d];
        }
    });
    std::fill(total, total + width, T(0));
    for (int64_t c = 0; c < chunks_of(rows); ++c)
        for (int64_t d = 0; d < width; ++d) total[d] += partial[c * 2 * width + d];
}

// The distance of the rows of [N, width], whose elements lie side by side.
template <class T>
int64_t row_stride(const py::array_t<T>& x, int64_t N, int64_t width, const char* what) {
    require(x.ndim() == 2 && x.shape(0) == N && x.shape(1) == width, what);
    if (x.size() == 0) return 0;  // numpy gives empty arrays any strides
    require(width == 1 || x.strides(1) == static_cast<py::ssize_t>(sizeof(T)), what);
    return x.strides(0) / static_cast<py::ssize_t>(sizeof(T));
}

// Likewise of [N, H, D], whose rows of H * D elements lie side by side.
template <class T>
int64_t heads_stride(const py::array_t<T>& x, int64_t N, int64_t H, int64_t D, const char* what) {
    require(x.ndim() == 3 && x.shape(0) == N && x.shape(1) == H && x.shape(2) == D, what);
    if (x.size() == 0) return 0;
    const auto item = static_cast<py::ssize_t>(sizeof(T));
    require((D == 1 || x.strides(2) == item) && (H == 1 || x.strides(1) == D * item), what);
    return x.strides(0) / item;
}

template <class T>
T* rows_of(Dense<T>& x, int64_t N, int64_t width, const char* what) {
    require(x.ndim() == 2 && x.shape(0) == N && x.shape(1) == width, what);
    return x.mutable_data();
}

template <class T>
T* heads_of(Dense<T>& x, int64_t N, int64_t H, int64_t D, const char* what) {
    require(x.ndim() == 3 && x.shape(0) == N && x.shape(1) == H && x.shape(2) == D, what);
    return x.mutable_data();
}

template <class T>
T* list_of(Dense<T>& x, int64_t N, const char* what) {
    require(x.ndim() == 1 && x.shape(0) == N, what);
    return x.mutable_data();
}
