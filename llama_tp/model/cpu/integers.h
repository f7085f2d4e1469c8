// Products of quantized weights, as the integers that they are, with inputs rounded to 8-bit integers ("codes").
//
// A token's inputs have a scale for every few columns, so that a large one does not cost the others their precision.
// Sums of products are exact as long as they are integers. Signed weights are read as unsigned ones, 128 larger; what
// that adds is known from the sums of the inputs.
#pragma once

#include <type_traits>

#include "linear.h"

namespace llama_tp {

// Columns of a block: two vectors of weights, of int4 those with even and those with odd indices. A lane of both has
// the same scale for its inputs.
constexpr int kCodes = 8 * W;
constexpr float kSmallestInput = 1e-36f;  // whose inverse, times 127, is finite

constexpr bool has_integer_product(Form form) {
    return form == kInt4 || ((form == kInt8 || form == kInt8Groups) && kLargestByte == 255);
}

// The codes of two vectors of inputs, where the product reads them. `at` is their place in the block.
template <bool is_int4>
inline void store_codes(uint8_t* block, int at, vf a, vf b) {
    if constexpr (is_int4) {
        vf even, odd;
        split(a, b, even, odd);
        store_bytes(block + at / 2, even);
        store_bytes(block + kCodes / 2 + at / 2, odd);
    } else {
        store_bytes(block + at, a);
        store_bytes(block + at + W, b);
    }
}

template <bool is_int4>
inline void fill_codes_of(Input& in, const Linear& linear, int token, const float* x) {
    const int columns = int(linear.columns);
    uint8_t* codes = in.codes + int64_t(token) * in.stride;
    float* scales = in.scales + int64_t(token) * (in.stride / 8);
    float* sums = in.sums + int64_t(token) * in.sum_stride;
    std::memset(sums, 0, in.sum_stride * sizeof(float));
    constexpr int kGroups = kCodes / kGroup, kVectors = kGroup / W;
    // Groups this far apart in a block share lanes, and a scale.
    constexpr int apart = is_int4 ? kGroups : kGroups / 2;
    for (int k = 0; k < columns; k += kCodes) {
        const int count = std::min(kCodes, columns - k) / kGroup;
        for (int first = 0; first < apart; ++first) {
            vf most{};
            for (int group = first; group < count; group += apart) {
                const float* from = x + k + group * kGroup;
                for (int i = 0; i < kVectors; ++i) most = maximum(most, magnitude(load<vf>(from + i * W)));
            }
            const float largest_input = largest(most), scale = largest_input / 127.0f;
            // Of tiny inputs the inverse would be infinite: they become 0.
            const float inverse = largest_input > kSmallestInput ? 127.0f / largest_input : 0.0f;
            for (int group = first; group < kGroups; group += apart) {
                vf total{};
                for (int i = 0; i < kGroup; i += 2 * W) {
                    vf a{}, b{};
                    if (group < count) {
                        a = rounded(load<vf>(x + k + group * kGroup + i) * inverse);
                        b = rounded(load<vf>(x + k + group * kGroup + i + W) * inverse);
                    }
                    total += a + b;
                    store_codes<is_int4>(codes + k, group * kGroup + i, a, b);
                }
                if (group < count) sums[k / kGroup + group] = sum(total) * scale;
            }
            std::fill_n(scales + k / 8 + first * (W / apart), W / apart, scale);
        }
    }
    if (linear.form != kInt8) return;
    vf total{};
    for (int group = 0; group < in.sum_stride; group += W) total += load<vf>(sums + group);
    std::memset(sums, 0, W * sizeof(float));
    sums[0] = -128.0f * sum(total);  // to be scaled with the row
}

inline void fill_codes(Input& in, const Linear& linear, int token, const float* x) {
    (linear.form == kInt4 ? fill_codes_of<true> : fill_codes_of<false>)(in, linear, token, x);
}

// A block of weights; `count` columns are left in the row.
template <Form form>
inline __attribute__((always_inline)) void load_weights(const uint8_t* from, int count, vb& a, vb& b) {
    constexpr int kBytes = kCodes / 2;
    if constexpr (form == kInt4) {
        const vb packed = count >= kCodes ? load<vb>(from) : first_bytes(from, count / 2);
        a = packed & 15;
        b = packed >> 4;
    } else if (count >= kCodes) {
        a = load<vb>(from) ^ 128;
        b = load<vb>(from + kBytes) ^ 128;
    } else {
        a = first_bytes(from, std::min(count, kBytes)) ^ 128;
        b = first_bytes(from + kBytes, std::max(count - kBytes, 0)) ^ 128;
    }
}

template <Form form, int R, int T>
inline __attribute__((always_inline)) void code_tile(const Linear& linear, int64_t row, const Input& in, int token,
                                                     const Output& out) {
    constexpr bool is_grouped = form != kInt8;
    constexpr int kBytes = form == kInt4 ? kCodes / 2 : kCodes;  // of weights, in a block of a row
    const int columns = int(linear.columns), groups = columns / kGroup;
    const int64_t row_bytes = bytes_per_row(linear), next = row + rows_ahead(linear, R);
    const uint8_t* weight = (const uint8_t*)linear.weight + row * row_bytes;
    const uint8_t* ahead = (const uint8_t*)linear.weight + next * row_bytes;
    const uint8_t* codes = in.codes + int64_t(token) * in.stride;
    const float* scales_of_codes = in.scales + int64_t(token) * (in.stride / 8);
    const float* sums = in.sums + int64_t(token) * in.sum_stride;
    if (is_grouped) fetch_scales(linear, next, R);
    vf acc[R][T];
    LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) acc[r][t] =
        is_grouped ? vf{} : load<vf>(sums + int64_t(t) * in.sum_stride);
    for (int first = 0; first < groups; first += W) {
        vf scales[R];
        if constexpr (is_grouped) {
            LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) {
                scales[r] = halves_at(linear.scales, row + r, groups, first);
                const vf offsets = form == kInt4 ? offsets_at(linear, row + r, groups, first) : scales[r] * -128.0f;
                LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) acc[r][t] =
                    fma(offsets, load<vf>(sums + int64_t(t) * in.sum_stride + first), acc[r][t]);
            }
        }
        const auto block = [&](auto index) __attribute__((always_inline)) {
            constexpr int kFirst = index() * kCodes / kGroup;  // of the scales
            const int k = (first + kFirst) * kGroup;
            if (k >= columns) return;
            LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) {
                vb a, b;
                load_weights<form>(weight + r * row_bytes + (form == kInt4 ? k / 2 : k), columns - k, a, b);
                fetch(ahead, kBytes);
                ahead += kBytes;
                LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) {
                    const uint8_t* x = codes + int64_t(t) * in.stride + k;
                    const vb xa = load<vb>(x), xb = load<vb>(x + kCodes / 2);
                    const vf scale = load<vf>(scales_of_codes + int64_t(t) * (in.stride / 8) + k / 8);
                    vf& to = acc[r][t];
                    if constexpr (form == kInt8) {
                        to = fma(to_float(add_products(add_products(vi{}, a, xa), b, xb)), scale, to);
                    } else if constexpr (form == kInt4) {
                        const vf products = to_float(add_products(add_products(vi{}, a, xa), b, xb));
                        to = fma(products * scale, spread<kFirst, 4>(scales[r]), to);
                    } else {
                        const vf pa = to_float(add_products(vi{}, a, xa)), pb = to_float(add_products(vi{}, b, xb));
                        const vf sa = spread<kFirst, 8>(scales[r]), sb = spread<kFirst + W / 8, 8>(scales[r]);
                        to = fma(fma(pa, sa, pb * sb), scale, to);
                    }
                }
            }
        };
        block(std::integral_constant<int, 0>());
        block(std::integral_constant<int, 1>());
        block(std::integral_constant<int, 2>());
        block(std::integral_constant<int, 3>());
    }
    finish<R, T>(linear, row, token, acc, out);
}

template <Form form, int R>
inline void code_rows(const Linear& linear, int64_t row, const Input& in, const Output& out) {
    for (int token = 0; token < in.tokens; token += kTile) {
        switch (in.tokens - token) {
            case 1: code_tile<form, R, 1>(linear, row, in, token, out); break;
            case 2: code_tile<form, R, 2>(linear, row, in, token, out); break;
            case 3: code_tile<form, R, 3>(linear, row, in, token, out); break;
            default: code_tile<form, R, 4>(linear, row, in, token, out);
        }
    }
}

template <Form form>
void multiply_codes_of(const Linear& linear, int64_t row, int64_t end, const Input& in, const Output& out) {
    constexpr int kRows = W / 4;  // at a time
    if (in.tokens == 1) {
        const int rows = rows_at_once(linear);
        for (; rows == 4 && row + 4 <= end; row += 4) code_tile<form, 4, 1>(linear, row, in, 0, out);
        for (; rows == 2 && row + 2 <= end; row += 2) code_tile<form, 2, 1>(linear, row, in, 0, out);
    } else if (in.tokens <= kTile && rows_at_once(linear) < 4) {
        for (; row + 2 <= end; row += 2) code_rows<form, 2>(linear, row, in, out);
    } else {
        for (; row + kRows <= end; row += kRows) code_rows<form, kRows>(linear, row, in, out);
    }
    for (; row < end; ++row) code_rows<form, 1>(linear, row, in, out);
}

inline void multiply_codes(const Linear& linear, int64_t row, int64_t end, const Input& in, const Output& out) {
    switch (linear.form) {
        case kInt8: return multiply_codes_of<kInt8>(linear, row, end, in, out);
        case kInt8Groups: return multiply_codes_of<kInt8Groups>(linear, row, end, in, out);
        default: return multiply_codes_of<kInt4>(linear, row, end, in, out);
    }
}

}  // namespace llama_tp
