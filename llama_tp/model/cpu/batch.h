// Products of many tokens in bfloat16, in the manner of a matrix product: a block of rows is brought into the order
// that pairs of columns are multiplied in, and then multiplied with all tokens.
#pragma once

#include <type_traits>

#include "bfloat16.h"

namespace llama_tp {

constexpr int kVectors = 3, kBatchTokens = 8;  // of a tile: its sums stay in registers
constexpr int kBatchRows = kVectors * W;
constexpr int kBlockColumns = 64;  // whose integers share a scale

inline int num_blocks(int64_t columns) { return int((columns + kBlockColumns - 1) / kBlockColumns); }

// Memory for a block of rows.
struct BatchScratch {
    Buffer<uint16_t> packed;   // (columns / 2, kBatchRows, 2), or as many integers
    Buffer<uint16_t> widened;  // one row
    Buffer<uint8_t> codes;     // W rows of integers, not packed yet
    Buffer<float> scales;      // (blocks, kBatchRows): of the packed integers

    // For layers of up to this many columns.
    void resize(int64_t columns) {
        packed.resize(kBatchRows * columns);
        widened.resize(columns);
        codes.resize(W * columns);
        scales.resize(kBatchRows * num_blocks(columns));
    }
};

// Calls compute(size, token) for tiles of tokens, `size` being a constant. Meanwhile fetches rows row ..
// row + kBatchRows - 1.
template <class Compute>
inline void for_tiles(const Linear& linear, int64_t row, int tokens, Compute compute) {
    const int64_t size_of_row = bytes_per_row(linear);
    const char* weights = (const char*)linear.weight + row * size_of_row;
    const int64_t per_token = std::max<int64_t>(kLine, kBatchRows * size_of_row / tokens);
    fetch_scales(linear, row, kBatchRows);
    int token = 0;
    const auto tiles_of = [&](auto size) {
        for (; token + size() <= tokens; token += size()) {
            fetch(weights + token * per_token, size() * per_token);
            compute(size, token);
        }
    };
    tiles_of(std::integral_constant<int, kBatchTokens>());
    tiles_of(std::integral_constant<int, 4>());
    tiles_of(std::integral_constant<int, 1>());
}

#if defined(LLAMA_TP_AVX512)
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
#endif

// Where the sums of a batch go: store(token, row, count, sums of `count` rows).
struct BFloat16Output {
    uint16_t* y;  // (tokens, rows)
    int64_t rows;

    void store(int64_t token, int64_t row, int count, vf sums) const {
        store_first_bf16(y + token * rows + row, count, sums);
    }
};

struct FloatOutput {
    Output out;

    void store(int64_t token, int64_t row, int count, vf sums) const {
        float* to = out.values + token * out.stride + row;
        store_first(to, count, out.add ? first_floats(to, count) + sums : sums);
    }
};

#if defined(__AVX512BF16__)
constexpr bool kHasBatchProduct = true;

// Rows row .. row + kBatchRows - 1; zeros for those from `end` on.
inline void pack_rows(const Linear& linear, int64_t row, int64_t end, BatchScratch& scratch) {
    const int columns = int(linear.columns);
    for (int first = 0; first < kBatchRows; first += W) {
        const uint16_t* of[W];
        const int count = int(std::clamp<int64_t>(end - row - first, 0, W));
        for (int r = 0; r < count; ++r) of[r] = (const uint16_t*)linear.weight + (row + first + r) * columns;
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

// A block of rows for T tokens; x (tokens, columns).
template <int T, class Out>
inline void batch_tile(const Linear& linear, int64_t row, int64_t end, const uint16_t* packed, const uint16_t* x,
                       int64_t token, const Out& out) {
    const int columns = int(linear.columns);
    const uint16_t* of[T];
    LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) of[t] = x + (token + t) * columns;
    vf acc[kVectors][T];
    pair_tile<kVectors, T>(packed, kBatchRows * 2, columns / 2, of, acc);
    LLAMA_TP_UNROLL for (int v = 0; v < kVectors; ++v) {
        const int64_t first = row + v * W;
        const int count = int(std::clamp<int64_t>(end - first, 0, W));
        const vf bias = linear.bias == nullptr ? vf{} : first_floats(linear.bias + first, count);
        LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) out.store(token + t, first, count, acc[v][t] + bias);
    }
}

template <class Out>
inline void multiply_batch(const Linear& linear, int64_t row, int64_t end, const uint16_t* x, int tokens,
                           BatchScratch& scratch, const Out& out) {
    for (; row < end; row += kBatchRows) {
        pack_rows(linear, row, end, scratch);
        for_tiles(linear, row + kBatchRows, tokens, [&](auto size, int64_t token) {
            batch_tile<size()>(linear, row, end, scratch.packed.data(), x, token, out);
        });
    }
}

// A token's inputs, which are float32.
inline void round_to_bf16(uint16_t* to, const float* x, int64_t columns) {
    for (int64_t k = 0; k < columns; k += W) store_first_bf16(to + k, W, load<vf>(x + k));
}
#else
constexpr bool kHasBatchProduct = false;

template <class Out>
inline void multiply_batch(const Linear&, int64_t, int64_t, const uint16_t*, int, BatchScratch&, const Out&) {}

inline void round_to_bf16(uint16_t*, const float*, int64_t) {}
#endif

}  // namespace llama_tp
