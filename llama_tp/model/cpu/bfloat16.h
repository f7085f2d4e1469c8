// Products with the CPU's instructions for bfloat16, which the inputs are rounded to, and weights are widened to.
#pragma once

#include "exact.h"

namespace llama_tp {

// A row of a quantized matrix in bfloat16: in its own order, or as the factors of a product with Input.halves, which
// leave the scale of an int8 row to `finish`.
template <bool is_factor>
inline void widen_row(const Linear& linear, int64_t row, uint16_t* to) {
    const int groups = int(linear.columns) / kGroup;
    const auto widen = [&](auto form) __attribute__((always_inline)) {
        for (int first = 0; first < groups; first += W) {
            float scales[W], offsets[W] = {};
            if (linear.form == kInt8) {
                const float of_row = is_factor ? 1.0f : ((const float*)linear.scales)[row];
                for (float& scale : scales) scale = of_row;
            } else {
                store(scales, halves_at(linear.scales, row, groups, first));
            }
            if (linear.form == kInt4) store(offsets, offsets_at(linear, row, groups, first));
            for (int group = 0; group < std::min(W, groups - first); ++group) {
                for (int k = (first + group) * kGroup; k < (first + group + 1) * kGroup; k += 2 * W) {
                    vf a, b;
                    form.block(row, k, 2 * W, a, b);
                    a = fma(a, splat(scales[group]), splat(offsets[group]));
                    b = fma(b, splat(scales[group]), splat(offsets[group]));
                    if (!is_factor && linear.form == kInt4) interleave(a, b, a, b);
                    store_bf16(to + k, a, b);
                }
            }
        }
    };
    if (linear.form == kInt4) {
        widen(forms::Int4(linear));
    } else {
        widen(forms::Int8<true>(linear));
    }
}

#if defined(__AVX512BF16__)
constexpr bool kHasBFloat16 = true;

// A product of pairs only needs both sides in the same order: as stored for bfloat16 and int8, split for int4.
inline void fill_halves(Input& in, const Linear& linear, int token, const float* x) {
    uint16_t* to = in.halves + int64_t(token) * in.stride;
    const int columns = int(linear.columns), whole = columns / (2 * W) * (2 * W);
    for (int k = 0; k < whole; k += 2 * W) {
        vf a = load<vf>(x + k), b = load<vf>(x + k + W);
        if (linear.form == kInt4) split(a, b, a, b);
        store_bf16(to + k, a, b);
    }
    if (whole == columns) return;
    std::memset(to + whole, 0, (in.stride - whole) * sizeof(uint16_t));
    for (int k = whole; k < columns; ++k) to[k] = to_bf16(x[k]);
}

// Rows in bfloat16, in the order of Input.halves: as stored, or widened from integers to `scratch`.
inline const uint16_t* bfloat16_row(const Linear& linear, int64_t row, int stride, uint16_t* scratch) {
    const int columns = int(linear.columns);
    if (linear.form == kBFloat16) {
        const uint16_t* stored = (const uint16_t*)linear.weight + row * columns;
        if (columns == stride) return stored;
        std::memcpy(scratch, stored, columns * sizeof(uint16_t));
        std::memset(scratch + columns, 0, (stride - columns) * sizeof(uint16_t));
        return scratch;
    }
    widen_row<true>(linear, row, scratch);
    return scratch;
}

// `ahead`: stored weights to fetch meanwhile, `ahead_lines` for each 2 * W columns.
template <int R, int T>
inline __attribute__((always_inline)) void half_tile(const Linear& linear, const uint16_t* const (&rows)[R],
                                                     int64_t row, const Input& in, int token, const char* ahead,
                                                     int ahead_lines, const Output& out) {
    vf acc[R][T];
    LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) acc[r][t] = vf{};
    for (int k = 0; k < in.stride; k += 2 * W) {
        __m512bh w[R];
        LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) w[r] = load<__m512bh>(rows[r] + k);
        for (int line = 0; line < ahead_lines; ++line, ahead += kLine) fetch(ahead);
        LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) {
            const __m512bh x = load<__m512bh>(in.halves + int64_t(token + t) * in.stride + k);
            LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) acc[r][t] = _mm512_dpbf16_ps(acc[r][t], w[r], x);
        }
    }
    finish<R, T>(linear, row, token, acc, out);
}

// Whether the inputs leave room for weights in the first-level cache.
inline bool fits_cache(const Input& in) { return int64_t(in.tokens) * in.stride * sizeof(uint16_t) <= 24 << 10; }

template <int R>
inline void half_rows(const Linear& linear, int64_t row, const Input& in, uint16_t* scratch, const Output& out) {
    const uint16_t* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = bfloat16_row(linear, row + r, in.stride, scratch + int64_t(r) * in.stride);
    // Rows to come are fetched in as many parts as there are tiles and steps in a tile. Few, if the inputs leave no
    // room.
    const int64_t row_bytes = bytes_per_row(linear), next = row + (fits_cache(in) ? rows_ahead(linear, R) : R);
    const char* ahead = (const char*)linear.weight + next * row_bytes;
    fetch_scales(linear, next, R);
    const int tiles = (in.tokens + kTile - 1) / kTile, steps = in.stride / (2 * W);
    const int lines = int((R * row_bytes / kLine + tiles * steps - 1) / (tiles * steps));
    for (int token = 0; token < in.tokens; token += kTile, ahead += int64_t(lines) * steps * kLine) {
        switch (in.tokens - token) {
            case 1: half_tile<R, 1>(linear, rows, row, in, token, ahead, lines, out); break;
            case 2: half_tile<R, 2>(linear, rows, row, in, token, ahead, lines, out); break;
            case 3: half_tile<R, 3>(linear, rows, row, in, token, ahead, lines, out); break;
            default: half_tile<R, 4>(linear, rows, row, in, token, ahead, lines, out);
        }
    }
}

constexpr int kHalfRows = 6;  // most at a time

inline void multiply_in_bfloat16(const Linear& linear, int64_t row, int64_t end, const Input& in, uint16_t* scratch,
                                 const Output& out) {
    const bool fits = fits_cache(in);
    if (!fits) {  // inputs from the second-level cache are the limit
        for (; row + kHalfRows <= end; row += kHalfRows) half_rows<kHalfRows>(linear, row, in, scratch, out);
    }
    if (!fits || in.tokens > kTile) {  // else memory is the limit, and read fastest as a single stream
        for (; row + 4 <= end; row += 4) half_rows<4>(linear, row, in, scratch, out);
    }
    for (; row < end; ++row) half_rows<1>(linear, row, in, scratch, out);
}
#else
constexpr bool kHasBFloat16 = false;
constexpr int kHalfRows = 0;

inline void fill_halves(Input&, const Linear&, int, const float*) {}

inline void multiply_in_bfloat16(const Linear&, int64_t, int64_t, const Input&, uint16_t*, const Output&) {}
#endif

}  // namespace llama_tp
