// Products of many tokens in bfloat16, in the manner of a matrix product: a block of rows is brought into the order
// that pairs of columns are multiplied in, and then multiplied with all tokens.
#pragma once

#include <type_traits>

#include "bfloat16.h"

namespace llama_tp {

#if defined(__AVX512BF16__)
constexpr int kVectors = 3, kBatchTokens = 8;  // of a tile: its sums stay in registers
constexpr int kBatchRows = kVectors * W;
constexpr bool kHasBatchProduct = true;

// 16 x 16 numbers of 32 bits.
inline void transpose(__m512i (&rows)[16]) {
    __m512i t[16];
    LLAMA_TP_UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    LLAMA_TP_UNROLL for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    LLAMA_TP_UNROLL for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    LLAMA_TP_UNROLL for (int i = 0; i < 8; ++i) {
        rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// Memory for a block of rows: packed (columns / 2, kBatchRows, 2), and W rows widened to bfloat16.
struct BatchScratch {
    Buffer<uint16_t> packed, widened;

    // For layers of up to this many columns.
    void resize(int64_t columns) {
        packed.resize(kBatchRows * columns);
        widened.resize(W * columns);
    }
};

// Rows row .. row + kBatchRows - 1; zeros for those from `end` on.
inline void pack_rows(const Linear& linear, int64_t row, int64_t end, BatchScratch& scratch) {
    const int columns = int(linear.columns);
    for (int first = 0; first < kBatchRows; first += W) {
        const uint16_t* of[W];
        const int count = int(std::clamp<int64_t>(end - row - first, 0, W));
        for (int r = 0; r < count; ++r) {
            if (linear.form == kBFloat16) {
                of[r] = (const uint16_t*)linear.weight + (row + first + r) * columns;
            } else {
                uint16_t* to = scratch.widened.data() + r * columns;
                (linear.form == kInt4 ? widen_row<false> : widen_row<true>)(linear, row + first + r, to);
                of[r] = to;
            }
        }
        for (int k = 0; k < columns; k += 2 * W) {
            __m512i block[W];
            LLAMA_TP_UNROLL for (int r = 0; r < W; ++r) block[r] = r < count ? load<__m512i>(of[r] + k) : __m512i{};
            transpose(block);
            uint16_t* to = scratch.packed.data() + (k / 2 * kBatchRows + first) * 2;
            LLAMA_TP_UNROLL for (int pair = 0; pair < W; ++pair) store(to + pair * kBatchRows * 2, block[pair]);
        }
    }
}

// sums[v][t] = products of vector v of the packed numbers with x[t], for pairs of columns; `stride` numbers from one
// pair to the next.
template <int V, int T>
inline __attribute__((always_inline)) void pair_tile(const uint16_t* packed, int64_t stride, int pairs,
                                                     const uint16_t* const (&x)[T], vf (&sums)[V][T]) {
    LLAMA_TP_UNROLL for (int v = 0; v < V; ++v) LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) sums[v][t] = vf{};
    for (int pair = 0; pair < pairs; ++pair, packed += stride) {
        __m512bh w[V];
        LLAMA_TP_UNROLL for (int v = 0; v < V; ++v) w[v] = load<__m512bh>(packed + v * 2 * W);
        LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) {
            const __m512bh of_token = (__m512bh)_mm512_set1_epi32(load<int32_t>(x[t] + 2 * pair));
            LLAMA_TP_UNROLL for (int v = 0; v < V; ++v) sums[v][t] = _mm512_dpbf16_ps(sums[v][t], w[v], of_token);
        }
    }
}

// A block of rows for T tokens; x (T, columns), y (T, linear.rows).
template <int T>
inline void batch_tile(const Linear& linear, int64_t row, int64_t end, const uint16_t* packed, const uint16_t* x,
                       uint16_t* y) {
    const int columns = int(linear.columns);
    const uint16_t* of[T];
    LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) of[t] = x + int64_t(t) * columns;
    vf acc[kVectors][T];
    pair_tile<kVectors, T>(packed, kBatchRows * 2, columns / 2, of, acc);
    LLAMA_TP_UNROLL for (int v = 0; v < kVectors; ++v) {
        const int64_t first = row + v * W;
        const int count = int(std::clamp<int64_t>(end - first, 0, W));
        const vf scales = linear.form == kInt8 ? first_floats((const float*)linear.scales + first, count) : splat(1.0f);
        const vf bias = linear.bias == nullptr ? vf{} : first_floats(linear.bias + first, count);
        LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) {
            const __m256i sums = (__m256i)_mm512_cvtneps_pbh(fma(acc[v][t], scales, bias));
            _mm256_mask_storeu_epi16(y + t * linear.rows + first, uint16_t((1u << count) - 1), sums);
        }
    }
}

// Rows row .. end - 1, at most kBatchRows.
inline void multiply_batch(const Linear& linear, int64_t row, int64_t end, const uint16_t* x, int tokens,
                           BatchScratch& scratch, uint16_t* y) {
    pack_rows(linear, row, end, scratch);
    int token = 0;
    const auto tiles_of = [&](auto size) {
        constexpr int T = size();
        for (; token + T <= tokens; token += T) {
            batch_tile<T>(linear, row, end, scratch.packed.data(), x + token * linear.columns, y + token * linear.rows);
        }
    };
    tiles_of(std::integral_constant<int, kBatchTokens>());
    tiles_of(std::integral_constant<int, 4>());
    tiles_of(std::integral_constant<int, 1>());
}
#else
constexpr bool kHasBatchProduct = false;
constexpr int kBatchRows = 1;

struct BatchScratch {
    void resize(int64_t) {}
};

inline void multiply_batch(const Linear&, int64_t, int64_t, const uint16_t*, int, BatchScratch&, uint16_t*) {}
#endif

// Whether this library multiplies many tokens in bfloat16 faster than PyTorch does, which uses AMX.
constexpr bool multiplies_batches() {
#if defined(__AMX_BF16__)
    return false;
#else
    return kHasBatchProduct;
#endif
}

}  // namespace llama_tp
