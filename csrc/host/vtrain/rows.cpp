// Stored feature rows to float32. A segment's rows lie end to end, so a read is one conversion per segment.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace py = pybind11;

namespace {

using Numbers = py::array_t<int64_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

void from_bf16(const uint8_t* from, int64_t n, float* out) {
    const auto* rows = reinterpret_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < n; ++i) out[i] = bits_to_float(uint32_t{rows[i]} << 16);
}

void from_half_portable(const uint16_t* from, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t sign = (from[i] & 0x8000u) << 16, rest = from[i] & 0x7FFFu;
        // The exponent is 112 less than a float's; a product by 2**112 is exact, for subnormal numbers too.
        const float value = bits_to_float(rest << 13) * bits_to_float((127u + 112u) << 23);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if (rest >= 0x7C00u) bits = 0x7F800000u | rest << 13;
        out[i] = bits_to_float(bits | sign);
    }
}

#if defined(__x86_64__)
__attribute__((target("avx,f16c"))) void from_half_f16c(const uint16_t* from, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    from_half_portable(from + i, n - i, out + i);
}
#endif

void from_half(const uint8_t* from, int64_t n, float* out) {
    const auto* rows = reinterpret_cast<const uint16_t*>(from);
#if defined(__x86_64__)
    if (__builtin_cpu_supports("f16c")) return from_half_f16c(rows, n, out);
#endif
    from_half_portable(rows, n, out);
}

void from_bytes(const uint8_t* from, const float* scales, int64_t rows, int64_t dim, float* out) {
    const auto* steps = reinterpret_cast<const int8_t*>(from);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = 0; d < dim; ++d) out[r * dim + d] = static_cast<float>(steps[r * dim + d]) * scales[r];
}

void require(bool holds, const std::string& what) {
    if (!holds) throw py::value_error("gather_rows: " + what);
}

// stored: rows of `dim` numbers of a kind f4, f2, bf16 or i1, as bytes; scales: float32 per row, of i1 only. Rows
// starts[j]..starts[j]+counts[j] go to out[at[j]:].
void gather_rows(const py::array_t<uint8_t, py::array::c_style>& stored, const std::string& kind,
                 const std::optional<Floats>& scales, const Numbers& starts, const Numbers& counts, Floats& out,
                 const Numbers& at) {
    const int64_t item = kind == "f4" ? 4 : kind == "f2" || kind == "bf16" ? 2 : kind == "i1" ? 1 : 0;
    require(item > 0, "rows of " + kind + "; expected f4, f2, bf16 or i1");
    require(out.ndim() == 2 && out.shape(1) > 0, "out must be float32[rows, dim]");
    const int64_t dim = out.shape(1), room = out.shape(0), n = at.size(), rows = stored.size() / (item * dim);
    require(starts.size() == n && counts.size() == n, "starts, counts and at differ in length");
    require(kind != "i1" || (scales && scales->size() >= rows), "a scale per row of i1");
    for (int64_t j = 0; j < n; ++j) {
        const int64_t start = starts.data()[j], count = counts.data()[j], to = at.data()[j];
        require(start >= 0 && count >= 0 && start <= rows && count <= rows - start && to >= 0 && to <= room &&
                    count <= room - to,
                std::to_string(count) + " rows from " + std::to_string(start) + " of " + std::to_string(rows) +
                    " to place " + std::to_string(to) + " of " + std::to_string(room));
    }
    float* o = out.mutable_data();
    py::gil_scoped_release unlocked;
    for (int64_t j = 0; j < n; ++j) {
        const int64_t start = starts.data()[j], count = counts.data()[j];
        const uint8_t* from = stored.data() + start * dim * item;
        float* to = o + at.data()[j] * dim;
        if (kind == "f4")
            std::memcpy(to, from, static_cast<size_t>(count * dim * item));
        else if (kind == "f2")
            from_half(from, count * dim, to);
        else if (kind == "bf16")
            from_bf16(from, count * dim, to);
        else
            from_bytes(from, scales->data() + start, count, dim, to);
    }
}

}  // namespace

void bind_rows(py::module_& m) {
    m.def("gather_rows", &gather_rows, py::arg("stored").noconvert(), py::arg("kind"), py::arg("scales").noconvert(),
          py::arg("starts").noconvert(), py::arg("counts").noconvert(), py::arg("out").noconvert(),
          py::arg("at").noconvert(),
          "Rows starts[j]..starts[j]+counts[j] of stored feature rows (u8 bytes of f4, f2, bf16 or i1 with a scale per "
          "row) to out[at[j]:], float32[rows, dim].");
}
