// y = x W^T for a few tokens, W as it is stored: the rows of W are read once, in order.
//
// A dot product is added up in one vector, in the order of the columns, however many rows and tokens are computed
// together: a token's results do not depend on the others.
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

constexpr int kLine = 64;  // bytes of a cache line

inline void fetch(const void* from) { __builtin_prefetch(from); }

inline int64_t bytes_per_row(const Linear& linear) {
    switch (linear.form) {
        case kFloat32: return linear.columns * 4;
        case kBFloat16: return linear.columns * 2;
        case kInt4: return linear.columns / 2;
        default: return linear.columns;
    }
}

inline bool in_split_order(Form form) { return form == kBFloat16 || form == kInt4; }

// The tokens' inputs, in the order that a form reads them. Rows are padded with zeros.
struct Input {
    int tokens = 0, stride = 0, sum_stride = 0;
    float* values = nullptr;     // (tokens, stride)
    float* sums = nullptr;       // (tokens, sum_stride): of every group of 32, for int4
    uint16_t* halves = nullptr;  // (tokens, stride) in bfloat16, if the product uses it

    const float* of(int token) const { return values + int64_t(token) * stride; }
};

// To split order, or back; the padding is not touched.
inline int split_place(int i) { return i / (2 * W) * (2 * W) + (i & 1) * W + i % (2 * W) / 2; }

inline void fill_values(Input& in, const Linear& linear, int token, const float* x) {
    float* to = in.values + int64_t(token) * in.stride;
    const int columns = int(linear.columns);
    if (in_split_order(linear.form)) {
        if (columns < in.stride) std::memset(to + in.stride - 2 * W, 0, 2 * W * sizeof(float));
        const int whole = columns / (2 * W) * (2 * W);
        for (int k = 0; k < whole; k += 2 * W) {
            vf even, odd;
            split(load<vf>(x + k), load<vf>(x + k + W), even, odd);
            store(to + k, even);
            store(to + k + W, odd);
        }
        for (int k = whole; k < columns; ++k) to[split_place(k)] = x[k];
    } else {
        std::memcpy(to, x, columns * sizeof(float));
        std::memset(to + columns, 0, (in.stride - columns) * sizeof(float));
    }
    if (linear.form != kInt4) return;
    float* sums = in.sums + int64_t(token) * in.sum_stride;
    std::memset(sums, 0, in.sum_stride * sizeof(float));
    for (int group = 0; group < columns / kGroup; ++group) {
        vf total{};
        for (int k = 0; k < kGroup; k += W) total += load<vf>(x + group * kGroup + k);
        sums[group] = sum(total);
    }
}

namespace forms {

// Each reads blocks of 2 * W columns of a row as floats, in the order of Input.values, and fetches them in advance.

struct Float32 {
    static constexpr bool kGrouped = false;
    const float* weight;
    int64_t columns;
    explicit Float32(const Linear& one) : weight((const float*)one.weight), columns(one.columns) {}
    void fetch_block(int64_t row, int k) const {
        fetch(weight + row * columns + k);
        fetch(weight + row * columns + k + W);
    }
    void block(int64_t row, int k, int count, vf& a, vf& b) const {
        const float* from = weight + row * columns + k;
        if (count == 2 * W) {
            a = load<vf>(from);
            b = load<vf>(from + W);
        } else {
            a = first_floats(from, std::min(count, W));
            b = first_floats(from + W, std::max(count - W, 0));
        }
    }
};

struct BFloat16 {
    static constexpr bool kGrouped = false;
    const uint16_t* weight;
    int64_t columns;
    explicit BFloat16(const Linear& one) : weight((const uint16_t*)one.weight), columns(one.columns) {}
    void fetch_block(int64_t row, int k) const { fetch(weight + row * columns + k); }
    void block(int64_t row, int k, int count, vf& a, vf& b) const {
        const uint16_t* from = weight + row * columns + k;
        const vu pairs = count == 2 * W ? load<vu>(from) : first_pairs(from, count);
        a = even_bf16(pairs);
        b = odd_bf16(pairs);
    }
};

template <bool grouped>
struct Int8 {
    static constexpr bool kGrouped = grouped;
    const int8_t* weight;
    int64_t columns;
    explicit Int8(const Linear& one) : weight((const int8_t*)one.weight), columns(one.columns) {}
    void fetch_block(int64_t row, int k) const {
        if (k % 64 == 0) fetch(weight + row * columns + k);
    }
    void block(int64_t row, int k, int, vf& a, vf& b) const {
        const int8_t* from = weight + row * columns + k;
        a = to_float(signed_bytes(from));
        b = to_float(signed_bytes(from + W));
    }
};

struct Int4 {
    static constexpr bool kGrouped = true;
    const uint8_t* weight;
    int64_t columns;
    explicit Int4(const Linear& one) : weight((const uint8_t*)one.weight), columns(one.columns) {}
    void fetch_block(int64_t row, int k) const {
        if (k % 128 == 0) fetch(weight + (row * columns + k) / 2);
    }
    void block(int64_t row, int k, int, vf& a, vf& b) const {
        const vi packed = bytes(weight + (row * columns + k) / 2);
        a = to_float(packed & 15);
        b = to_float(packed >> 4);
    }
};

}  // namespace forms

// Float32 copies of W float16 numbers from `group` on; zeros behind the last.
inline vf halves_at(const void* numbers, int64_t row, int groups, int group) {
    return first_halves((const uint16_t*)numbers + row * groups + group, std::min(W, groups - group));
}

inline vf offsets_at(const Linear& linear, int64_t row, int groups, int group) {
    if (!linear.has_float32_offsets) return halves_at(linear.offsets, row, groups, group);
    const float* from = (const float*)linear.offsets + row * groups + group;
    return first_floats(from, std::min(W, groups - group));
}

// acc[r][t] = dot product of row + r and token + t, before it is added up.
template <class F, int R, int T>
inline __attribute__((always_inline)) void dot(const F& form, const Linear& linear, int64_t row, const Input& in,
                                               int token, vf (&acc)[R][T]) {
    const int columns = int(linear.columns), whole = columns / (2 * W) * (2 * W);
    const float* x[T];
    LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) x[t] = in.of(token + t);
    LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) acc[r][t] = vf{};
    const auto step = [&](int k, int count) __attribute__((always_inline)) {
        vf a[R], b[R];
        LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) form.block(row + r, k, count, a[r], b[r]);
        LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) form.fetch_block(row + R + r, k);
        LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) {
            const vf xa = load<vf>(x[t] + k), xb = load<vf>(x[t] + k + W);
            LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) acc[r][t] = fma(a[r], xa, acc[r][t]);
            LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) acc[r][t] = fma(b[r], xb, acc[r][t]);
        }
    };
    for (int k = 0; k < whole; k += 2 * W) step(k, 2 * W);
    if (whole < columns) step(whole, columns - whole);
}

// The same with a scale, and for int4 an offset, for each group of columns.
template <class F, int R, int T>
inline __attribute__((always_inline)) void dot_groups(const F& form, const Linear& linear, int64_t row, const Input& in,
                                                      int token, vf (&acc)[R][T]) {
    const int groups = int(linear.columns) / kGroup;
    const float* x[T];
    LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) x[t] = in.of(token + t);
    LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) acc[r][t] = vf{};
    for (int first = 0; first < groups; first += W) {
        float scales[R][W];
        LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) {
            store(scales[r], halves_at(linear.scales, row + r, groups, first));
            if (linear.form != kInt4) continue;
            const vf offsets = offsets_at(linear, row + r, groups, first);
            LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) acc[r][t] =
                fma(offsets, load<vf>(in.sums + int64_t(token + t) * in.sum_stride + first), acc[r][t]);
        }
        const int count = std::min(W, groups - first);
        for (int group = 0; group < count; ++group) {
            vf part[R][T];
            for (int at = 0; at < kGroup; at += 2 * W) {
                const int k = (first + group) * kGroup + at;
                vf a[R], b[R];
                LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) form.block(row + r, k, 2 * W, a[r], b[r]);
                LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) form.fetch_block(row + R + r, k);
                LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) {
                    const vf xa = load<vf>(x[t] + k), xb = load<vf>(x[t] + k + W);
                    LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) {
                        part[r][t] = fma(b[r], xb, at == 0 ? a[r] * xa : fma(a[r], xa, part[r][t]));
                    }
                }
            }
            LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) acc[r][t] =
                fma(part[r][t], splat(scales[r][group]), acc[r][t]);
        }
    }
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

// Store one tile's sums, after the rows' scales and biases.
template <int R, int T>
inline __attribute__((always_inline)) void finish(const Linear& linear, int64_t row, int token, const vf (&acc)[R][T],
                                                  const Output& out) {
    constexpr int N = R < 4 ? R : 4;
    LLAMA_TP_UNROLL for (int r = 0; r < R; r += N) {
        const __m128 scale =
            linear.form == kInt8 ? load_few<N>((const float*)linear.scales + row + r) : _mm_set1_ps(1.0f);
        const __m128 bias = linear.bias == nullptr ? _mm_setzero_ps() : load_few<N>(linear.bias + row + r);
        LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) {
            const __m128 sums = sum4(acc[r][t], acc[r + (N > 1)][t], acc[r + (N > 2) * 2][t], acc[r + (N > 3) * 3][t]);
            float* to = out.values + (token + t) * out.stride + row + r;
            const __m128 base = out.add ? _mm_add_ps(bias, load_few<N>(to)) : bias;
            store_few<N>(to, _mm_fmadd_ps(sums, scale, base));
        }
    }
}

template <class F, int R, int T>
inline __attribute__((always_inline)) void tile(const F& form, const Linear& linear, int64_t row, const Input& in,
                                                int token, const Output& out) {
    vf acc[R][T];
    if constexpr (F::kGrouped) {
        dot_groups<F, R, T>(form, linear, row, in, token, acc);
    } else {
        dot<F, R, T>(form, linear, row, in, token, acc);
    }
    finish<R, T>(linear, row, token, acc, out);
}

template <class F, int T>
inline void rows_of(const Linear& linear, int64_t row, int64_t end, const Input& in, int token, const Output& out) {
    constexpr int R = W == 16 ? (T == 1 ? 8 : 4) : (T == 1 ? 4 : 2);
    const F form(linear);
    for (; row + R <= end; row += R) tile<F, R, T>(form, linear, row, in, token, out);
    for (; row < end; ++row) tile<F, 1, T>(form, linear, row, in, token, out);
}

template <class F>
void multiply_exactly(const Linear& linear, int64_t row, int64_t end, const Input& in, const Output& out) {
    // Few enough rows at a time to find them in the cache again for the next tokens.
    const int64_t step = in.tokens > kTile ? 8 : end - row;
    for (; row < end; row += step) {
        const int64_t stop = std::min(end, row + step);
        for (int token = 0; token < in.tokens; token += kTile) {
            switch (in.tokens - token) {
                case 1: rows_of<F, 1>(linear, row, stop, in, token, out); break;
                case 2: rows_of<F, 2>(linear, row, stop, in, token, out); break;
                case 3: rows_of<F, 3>(linear, row, stop, in, token, out); break;
                default: rows_of<F, 4>(linear, row, stop, in, token, out);
            }
        }
    }
}

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

template <int R>
inline void half_rows(const Linear& linear, int64_t row, const Input& in, uint16_t* scratch, const Output& out) {
    const uint16_t* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = bfloat16_row(linear, row + r, in.stride, scratch + int64_t(r) * in.stride);
    // The next rows, in as many parts as there are tiles and steps in a tile.
    const int64_t row_bytes = bytes_per_row(linear);
    const char* ahead = (const char*)linear.weight + (row + R) * row_bytes;
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

constexpr int kHalfRows = 4;

inline void multiply_in_bfloat16(const Linear& linear, int64_t row, int64_t end, const Input& in, uint16_t* scratch,
                                 const Output& out) {
    for (; row + kHalfRows <= end; row += kHalfRows) half_rows<kHalfRows>(linear, row, in, scratch, out);
    for (; row < end; ++row) half_rows<1>(linear, row, in, scratch, out);
}
#else
constexpr bool kHasBFloat16 = false;
constexpr int kHalfRows = 0;

inline void fill_halves(Input&, const Linear&, int, const float*) {}

inline void multiply_in_bfloat16(const Linear&, int64_t, int64_t, const Input&, uint16_t*, const Output&) {}
#endif

// Rows row .. end - 1 of the product. `scratch`: kHalfRows * in.stride numbers.
inline void multiply(const Linear& linear, int64_t row, int64_t end, const Input& in, bool in_bfloat16,
                     uint16_t* scratch, const Output& out) {
    if (in_bfloat16) return multiply_in_bfloat16(linear, row, end, in, scratch, out);
    switch (linear.form) {
        case kFloat32: return multiply_exactly<forms::Float32>(linear, row, end, in, out);
        case kBFloat16: return multiply_exactly<forms::BFloat16>(linear, row, end, in, out);
        case kInt8: return multiply_exactly<forms::Int8<false>>(linear, row, end, in, out);
        case kInt8Groups: return multiply_exactly<forms::Int8<true>>(linear, row, end, in, out);
        case kInt4: return multiply_exactly<forms::Int4>(linear, row, end, in, out);
    }
}

}  // namespace llama_tp
