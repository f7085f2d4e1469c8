// y = x W^T for a few tokens, W as it is stored: the rows of W are read once, in order.
//
// There are three products, which differ in what they round the inputs to: nothing (exact.h), bfloat16 (bfloat16.h) and
// 8-bit integers (integers.h). A dot product is added up in one vector, in the order of the columns, however many rows
// and tokens are computed together: a token's results do not depend on the others.
#pragma once

#include <algorithm>

#include "simd.h"

namespace llama_tp {

constexpr int kGroup = 32;  // columns that share a scale
constexpr int kTile = 4;    // tokens computed together

enum Form : int32_t { kFloat32, kBFloat16, kInt8, kInt8Groups, kInt4 };

struct Linear {
    Form form;
    int32_t has_float32_offsets;
    int64_t rows, columns;
    const void* weight;
    const void* scales;   // int8: float32 (rows); groups: float16 (rows, columns / 32)
    const void* offsets;  // int4: (rows, columns / 32)
    const float* bias;
};

inline int64_t bytes_per_row(const Linear& linear) {
    switch (linear.form) {
        case kFloat32: return linear.columns * 4;
        case kBFloat16: return linear.columns * 2;
        case kInt4: return linear.columns / 2;
        default: return linear.columns;
    }
}

// The tokens' inputs, in the order that a product reads them. Rows are padded with zeros.
struct Input {
    int tokens = 0, stride = 0, sum_stride = 0;
    float* values = nullptr;     // (tokens, stride)
    uint16_t* halves = nullptr;  // the same in bfloat16
    uint8_t* codes = nullptr;    // the same in 8-bit integers
    float* scales = nullptr;     // (tokens, stride / 8): of the codes
    float* sums = nullptr;       // (tokens, sum_stride): of groups of columns
};

// Float32 copies of W float16 numbers from `group` on; zeros behind the last.
inline vf halves_at(const void* numbers, int64_t row, int groups, int group) {
    return first_halves((const uint16_t*)numbers + row * groups + group, std::min(W, groups - group));
}

inline vf offsets_at(const Linear& linear, int64_t row, int groups, int group) {
    if (!linear.has_float32_offsets) return halves_at(linear.offsets, row, groups, group);
    const float* from = (const float*)linear.offsets + row * groups + group;
    return first_floats(from, std::min(W, groups - group));
}

// Rows are fetched this far ahead: memory delivers them while the rows before are computed.
constexpr int kBytesAhead = 8192;

inline int64_t rows_ahead(const Linear& linear, int at_once) {
    return std::max<int64_t>(at_once, kBytesAhead / bytes_per_row(linear));
}

// Rows computed at a time for one token: memory is read fastest as a single stream, but adding up costs more for short
// rows.
inline int rows_at_once(const Linear& linear) {
    const int64_t size = bytes_per_row(linear);
    return size > 768 ? 1 : size > 384 ? 2 : 4;
}

// Scales and offsets of rows.
inline void fetch_scales(const Linear& linear, int64_t row, int64_t rows) {
    const int64_t groups = linear.columns / kGroup;
    const auto fetch_from = [&](const void* numbers, int size) {
        fetch((const char*)numbers + row * groups * size, rows * groups * size);
    };
    if (linear.form == kInt4) fetch_from(linear.offsets, linear.has_float32_offsets ? 4 : 2);
    if (linear.form == kInt4 || linear.form == kInt8Groups) fetch_from(linear.scales, 2);
}

// What a product that begins with this row needs first.
inline void fetch_rows(const Linear& linear, int64_t row) {
    const int64_t size = bytes_per_row(linear), rows = std::max<int64_t>(1, kBytesAhead / size);
    fetch((const char*)linear.weight + row * size, rows * size);
    fetch_scales(linear, row, rows);
}

struct Output {
    float* values;  // (tokens, stride)
    int64_t stride;
    bool add;  // to what is there
};

// Up to 4 floats.
template <int N>
inline __m128 load_few(const float* from) {
    if constexpr (N == 4) return _mm_loadu_ps(from);
    float four[4] = {};
    LLAMA_TP_UNROLL for (int i = 0; i < N; ++i) four[i] = from[i];
    return _mm_loadu_ps(four);
}

template <int N>
inline void store_few(float* to, __m128 values) {
    if constexpr (N == 4) return _mm_storeu_ps(to, values);
    LLAMA_TP_UNROLL for (int i = 0; i < N; ++i) to[i] = values[i];
}

// Store the sums of N of a tile's rows, after their scales and biases.
template <int N, int R, int T>
inline __attribute__((always_inline)) void finish_rows(const Linear& linear, int64_t row, int token, int r,
                                                       const vf (&acc)[R][T], const Output& out) {
    const __m128 scale = linear.form == kInt8 ? load_few<N>((const float*)linear.scales + row + r) : _mm_set1_ps(1.0f);
    const __m128 bias = linear.bias == nullptr ? _mm_setzero_ps() : load_few<N>(linear.bias + row + r);
    LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) {
        const __m128 sums = sum4(acc[r][t], acc[r + (N > 1)][t], acc[r + (N > 2) * 2][t], acc[r + (N > 3) * 3][t]);
        float* to = out.values + (token + t) * out.stride + row + r;
        const __m128 base = out.add ? _mm_add_ps(bias, load_few<N>(to)) : bias;
        store_few<N>(to, _mm_fmadd_ps(sums, scale, base));
    }
}

template <int R, int T>
inline __attribute__((always_inline)) void finish(const Linear& linear, int64_t row, int token, const vf (&acc)[R][T],
                                                  const Output& out) {
    constexpr int kRest = R % 4;
    LLAMA_TP_UNROLL for (int r = 0; r + 4 <= R; r += 4) finish_rows<4>(linear, row, token, r, acc, out);
    if constexpr (kRest > 0) finish_rows<kRest>(linear, row, token, R - kRest, acc, out);
}

}  // namespace llama_tp
