// Products of many tokens with quantized weights, as 8-bit integers: as batch.h, but with four columns in a lane
// instead of two, at up to 1.6 times the rate.
//
// Inputs are rounded to integers ("codes") with a scale for every kBlockColumns columns. So are the weights, except
// 8-bit integers with one scale for the row, which are used as stored.
#pragma once

#include "batch.h"
#include "integers.h"

namespace llama_tp {

// The inputs of all tokens.
struct Codes {
    uint8_t* codes;    // (tokens, columns): signed
    float* scales;     // (tokens, blocks)
    int32_t* offsets;  // (tokens, blocks): cancel what the 128 added to each weight contributes

    Codes(uint8_t* memory, int64_t tokens, int64_t columns)
        : codes(memory),
          scales((float*)(memory + tokens * columns)),
          offsets((int32_t*)(scales + tokens * num_blocks(columns))) {}

    static int64_t num_bytes(const Linear& linear, int64_t tokens) {
        return linear.form == kBFloat16 ? 0 : tokens * (linear.columns + 8 * num_blocks(linear.columns));
    }
};

#if defined(LLAMA_TP_AVX512) && defined(__AVX512VNNI__)
constexpr bool kHasIntegerBatch = true;

// Rounds a row of bfloat16 or float32 to codes, and calls store(block, scale, sum of codes) for each block. The scale
// of a block with a number that is not finite is not finite, either.
template <class Number, class Store>
inline void round_row(const Number* from, int columns, uint8_t* codes, Store store) {
    for (int k = 0; k < columns; k += kBlockColumns) {
        const int end = std::min(columns, k + kBlockColumns);
        vf most{}, total{}, a, b;
        for (int i = k; i < end; i += 2 * W) {
            load_stored(from + i, 2 * W, a, b);
            most = maximum(most, maximum(magnitude(a), magnitude(b)));
        }
        const float largest_number = largest(most);
        const float inverse = largest_number > kSmallestInput ? 127.0f / largest_number : 0.0f;
        for (int i = k; i < end; i += 2 * W) {
            load_stored(from + i, 2 * W, a, b);
            a = rounded(a * inverse);
            b = rounded(b * inverse);
            if constexpr (sizeof(Number) == 2) interleave(a, b, a, b);
            total += a + b;
            store_bytes(codes + i, a);
            store_bytes(codes + i + W, b);
        }
        const float sum_of_codes = sum(total);
        store(k / kBlockColumns, largest_number / 127.0f + 0.0f * sum_of_codes, sum_of_codes);
    }
}

template <class Number>
inline void round_inputs(const Codes& to, int64_t token, const Number* x, int64_t columns) {
    const int64_t first = token * num_blocks(columns);
    round_row(x, int(columns), to.codes + token * columns, [&](int block, float scale, float sum) {
        to.scales[first + block] = scale;
        to.offsets[first + block] = int32_t(-128.0f * sum);
    });
}

// A row of weights as signed integers. Writes their scales to `scales`, kBatchRows apart. `index`: where in `scratch`
// the row may be rounded.
inline const uint8_t* integer_row(const Linear& linear, int64_t row, int index, float* scales, BatchScratch& scratch) {
    const int columns = int(linear.columns);
    if (linear.form == kInt8) {
        const float scale = ((const float*)linear.scales)[row];
        for (int block = 0; block < num_blocks(columns); ++block) scales[block * kBatchRows] = scale;
        return (const uint8_t*)linear.weight + row * columns;
    }
    uint16_t* wide = scratch.widened.data();
    uint8_t* codes = scratch.codes.data() + index * columns;
    widen_row<false>(linear, row, wide);
    round_row(wide, columns, codes, [&](int block, float scale, float) { scales[block * kBatchRows] = scale; });
    return codes;
}

// Packs a block of rows: the weights plus 128, (columns / 4, kBatchRows, 4), and their scales, (blocks, kBatchRows).
// Those of rows from `end` on are arbitrary.
inline void pack_integers(const Linear& linear, int64_t row, int64_t end, BatchScratch& scratch) {
    const int columns = int(linear.columns);
    uint8_t* packed = (uint8_t*)scratch.packed.data();
    float* scales = scratch.scales.data();
    for (int first = 0; first < kBatchRows; first += W) {
        const uint8_t* of[W];
        const int count = int(std::clamp<int64_t>(end - row - first, 0, W));
        if (count == 0) return;
        for (int r = 0; r < W; ++r) {
            of[r] = r < count ? integer_row(linear, row + first + r, r, scales + first + r, scratch) : of[0];
        }
        for (int k = 0; k < columns; k += 4 * W) {
            const int quads = std::min(W, (columns - k) / 4);
            __m512i block[W];
            LLAMA_TP_UNROLL for (int r = 0; r < W; ++r) block[r] = (__m512i)(first_bytes(of[r] + k, 4 * quads) ^ 128);
            transpose(block);
            uint8_t* to = packed + (k / 4 * kBatchRows + first) * 4;
            for (int quad = 0; quad < quads; ++quad) store(to + quad * kBatchRows * 4, block[quad]);
        }
    }
}

// A block of rows for T tokens.
template <int T, class Out>
inline void integer_tile(const Linear& linear, int64_t row, int64_t end, const BatchScratch& scratch, const Codes& in,
                         int64_t token, const Out& out) {
    const int64_t columns = linear.columns, blocks = num_blocks(columns);
    const float* scales = in.scales + token * blocks;
    const int32_t* offsets = in.offsets + token * blocks;
    alignas(kLine) float sums[kVectors][T][W] = {};  // in memory: the registers are for the sums of integers
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t k = block * kBlockColumns;
        const uint8_t* weights = (const uint8_t*)scratch.packed.data() + k * kBatchRows;
        const uint8_t* x = in.codes + token * columns + k;
        vi acc[kVectors][T];
        LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) {
            LLAMA_TP_UNROLL for (int v = 0; v < kVectors; ++v) acc[v][t] = vi{} + offsets[t * blocks + block];
        }
        const int count = int(std::min<int64_t>(kBlockColumns, columns - k));
        for (int i = 0; i < count; i += 4, weights += kBatchRows * 4) {
            vb w[kVectors];
            LLAMA_TP_UNROLL for (int v = 0; v < kVectors; ++v) w[v] = load<vb>(weights + v * W * 4);
            LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) {
                const vb of_token = (vb)_mm512_set1_epi32(load<int32_t>(x + t * columns + i));
                LLAMA_TP_UNROLL for (int v = 0; v < kVectors; ++v) acc[v][t] = add_products(acc[v][t], w[v], of_token);
            }
        }
        LLAMA_TP_UNROLL for (int v = 0; v < kVectors; ++v) {
            const vf of_rows = load<vf>(scratch.scales.data() + block * kBatchRows + v * W);
            LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) {
                const vf products = to_float(acc[v][t]) * splat(scales[t * blocks + block]);
                store(sums[v][t], fma(products, of_rows, load<vf>(sums[v][t])));
            }
        }
    }
    for (int v = 0; v < kVectors; ++v) {
        const int64_t first = row + v * W;
        const int count = int(std::clamp<int64_t>(end - first, 0, W));
        const vf bias = linear.bias == nullptr ? vf{} : first_floats(linear.bias + first, count);
        for (int t = 0; t < T; ++t) out.store(token + t, first, count, load<vf>(sums[v][t]) + bias);
    }
}

template <class Out>
inline void multiply_integer_batch(const Linear& linear, int64_t row, int64_t end, const Codes& in, int tokens,
                                   BatchScratch& scratch, const Out& out) {
    for (; row < end; row += kBatchRows) {
        pack_integers(linear, row, end, scratch);
        for_tiles(linear, row + kBatchRows, tokens,
                  [&](auto size, int64_t token) { integer_tile<size()>(linear, row, end, scratch, in, token, out); });
    }
}
#else
constexpr bool kHasIntegerBatch = false;

template <class Number>
inline void round_inputs(const Codes&, int64_t, const Number*, int64_t) {}

template <class Out>
inline void multiply_integer_batch(const Linear&, int64_t, int64_t, const Codes&, int, BatchScratch&, const Out&) {}
#endif

constexpr bool kMultipliesBatches = kHasBatchProduct || kHasIntegerBatch;

// Whether this library multiplies many tokens faster than PyTorch does, which uses AMX.
constexpr bool multiplies_batches(Form form) {
#if defined(__AMX_BF16__)
    return false;
#else
    return form == kBFloat16 ? kHasBatchProduct : form != kFloat32 && kHasIntegerBatch;
#endif
}

}  // namespace llama_tp
