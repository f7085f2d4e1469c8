// Products of few tokens in float32.
#pragma once

#include "linear.h"

namespace llama_tp {

inline bool in_split_order(Form form) { return form == kBFloat16 || form == kInt4; }

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
        load_stored(weight + row * columns + k, count, a, b);
    }
};

struct BFloat16 {
    static constexpr bool kGrouped = false;
    const uint16_t* weight;
    int64_t columns;
    explicit BFloat16(const Linear& one) : weight((const uint16_t*)one.weight), columns(one.columns) {}
    void fetch_block(int64_t row, int k) const { fetch(weight + row * columns + k); }
    void block(int64_t row, int k, int count, vf& a, vf& b) const {
        load_stored(weight + row * columns + k, count, a, b);
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

// acc[r][t] = dot product of row + r and token + t, before it is added up.
template <class F, int R, int T>
inline __attribute__((always_inline)) void dot(const F& form, const Linear& linear, int64_t row, const Input& in,
                                               int token, vf (&acc)[R][T]) {
    const int columns = int(linear.columns), whole = columns / (2 * W) * (2 * W);
    const int64_t ahead = rows_ahead(linear, R);
    const float* x[T];
    LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) x[t] = in.values + int64_t(token + t) * in.stride;
    LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) acc[r][t] = vf{};
    const auto step = [&](int k, int count) __attribute__((always_inline)) {
        vf a[R], b[R];
        LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) form.block(row + r, k, count, a[r], b[r]);
        LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) form.fetch_block(row + ahead + r, k);
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
    const int64_t ahead = rows_ahead(linear, R);
    fetch_scales(linear, row + ahead, R);
    const float* x[T];
    LLAMA_TP_UNROLL for (int t = 0; t < T; ++t) x[t] = in.values + int64_t(token + t) * in.stride;
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
                LLAMA_TP_UNROLL for (int r = 0; r < R; ++r) form.fetch_block(row + ahead + r, k);
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

template <class F, int R, int T>
inline void rows_of(const Linear& linear, int64_t row, int64_t end, const Input& in, int token, const Output& out) {
    const F form(linear);
    for (; row + R <= end; row += R) tile<F, R, T>(form, linear, row, in, token, out);
    for (; row < end; ++row) tile<F, 1, T>(form, linear, row, in, token, out);
}

template <class F>
void multiply_form(const Linear& linear, int64_t row, int64_t end, const Input& in, const Output& out) {
    // Few enough rows at a time to find them in the cache again for the next tokens.
    constexpr int kRows = W / 4;
    const int64_t step = in.tokens > kTile ? 8 : end - row;
    for (; row < end; row += step) {
        const int64_t stop = std::min(end, row + step);
        for (int token = 0; token < in.tokens; token += kTile) {
            switch (in.tokens - token) {
                case 1:
                    switch (rows_at_once(linear)) {
                        case 1: rows_of<F, 1, 1>(linear, row, stop, in, token, out); break;
                        case 2: rows_of<F, 2, 1>(linear, row, stop, in, token, out); break;
                        default: rows_of<F, 4, 1>(linear, row, stop, in, token, out);
                    }
                    break;
                case 2: rows_of<F, kRows, 2>(linear, row, stop, in, token, out); break;
                case 3: rows_of<F, kRows, 3>(linear, row, stop, in, token, out); break;
                default: rows_of<F, kRows, 4>(linear, row, stop, in, token, out);
            }
        }
    }
}

inline void multiply_exactly(const Linear& linear, int64_t row, int64_t end, const Input& in, const Output& out) {
    switch (linear.form) {
        case kFloat32: return multiply_form<forms::Float32>(linear, row, end, in, out);
        case kBFloat16: return multiply_form<forms::BFloat16>(linear, row, end, in, out);
        case kInt8: return multiply_form<forms::Int8<false>>(linear, row, end, in, out);
        case kInt8Groups: return multiply_form<forms::Int8<true>>(linear, row, end, in, out);
        case kInt4: return multiply_form<forms::Int4>(linear, row, end, in, out);
    }
}

}  // namespace llama_tp
