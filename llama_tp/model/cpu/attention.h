// Attention of one kv head's queries over a part of a sequence's keys, read where they lie in the cache.
//
// Keys are computed in parts of kPart positions, whose results are merged: long contexts occupy all threads. The parts
// of a position are always the same, so its result does not depend on how the sequence is batched.
#pragma once

#include <algorithm>
#include <limits>

#include "simd.h"

namespace llama_tp {

constexpr int kPart = 512;              // keys
constexpr int kKeyBytesAhead = 4096;    // keys are fetched this far ahead
constexpr int kKeyBytesOfNext = 16384;  // and those of the next unit while values are added up: memory would idle

struct SlotRange {
    int32_t first, length;
};

alignas(64) constexpr float kOnesThenZeros[2 * W] = {
    1, 1, 1, 1, 1, 1, 1, 1,
#if defined(LLAMA_TP_AVX512)
    1, 1, 1, 1, 1, 1, 1, 1,
#endif
};

// Numbers of the cache, two formats; a block is 2 * W numbers, of bfloat16 in split order.
struct BFloat16Cache {
    using Number = uint16_t;
    static void block(const Number* from, int count, vf& a, vf& b) { load_stored(from, count, a, b); }
    static Number number(float value) { return to_bf16(value); }
    static void in_order(vf a, vf b, vf& first, vf& second) { split(a, b, first, second); }
    static void as_stored(vf first, vf second, vf& a, vf& b) { interleave(first, second, a, b); }
};

struct Float32Cache {
    using Number = float;
    static void block(const Number* from, int count, vf& a, vf& b) { load_stored(from, count, a, b); }
    static Number number(float value) { return value; }
    static void in_order(vf a, vf b, vf& first, vf& second) { first = a, second = b; }
    static void as_stored(vf first, vf second, vf& a, vf& b) { a = first, b = second; }
};

// The result of one query over one part: sum of e^(score - most) v, in the cache's order; the sum of weights; the most.
struct Partial {
    float *values, *total, *most;
};

// Keys begin .. end - 1 of a list of ranges, a contiguous piece at a time: visit(position, slot, count).
template <class Visit>
inline void visit_slots(const SlotRange* ranges, int begin, int end, Visit visit) {
    for (int position = 0; position < end; ++ranges) {
        const int from = std::max(begin, position), to = std::min(end, position + ranges->length);
        if (from < to) visit(from, int64_t(ranges->first) + from - position, to - from);
        position += ranges->length;
    }
}

// scores[query][key] = q . k * scale, for G queries. Fetches the keys' values, too, which will be needed next.
template <class C, int G>
inline void score_keys(const float* q, int q_stride, const typename C::Number* k, const typename C::Number* v,
                       int count, int dim, float scale, float* scores, int score_stride) {
    constexpr int N = 4;  // keys at a time
    const int64_t row_bytes = dim * sizeof(typename C::Number);
    const auto score = [&](int key, int of, const typename C::Number*(&rows)[N]) __attribute__((always_inline)) {
        vf acc[N][G];
        LLAMA_TP_UNROLL for (int i = 0; i < N; ++i) LLAMA_TP_UNROLL for (int g = 0; g < G; ++g) acc[i][g] = vf{};
        for (int d = 0; d < dim; d += 2 * W) {
            vf a[N], b[N];
            LLAMA_TP_UNROLL for (int i = 0; i < N; ++i) C::block(rows[i] + d, std::min(2 * W, dim - d), a[i], b[i]);
            LLAMA_TP_UNROLL for (int g = 0; g < G; ++g) {
                const vf qa = load<vf>(q + g * q_stride + d), qb = load<vf>(q + g * q_stride + d + W);
                LLAMA_TP_UNROLL for (int i = 0; i < N; ++i) acc[i][g] = fma(a[i], qa, acc[i][g]);
                LLAMA_TP_UNROLL for (int i = 0; i < N; ++i) acc[i][g] = fma(b[i], qb, acc[i][g]);
            }
        }
        LLAMA_TP_UNROLL for (int g = 0; g < G; ++g) {
            const __m128 four = sum4(acc[0][g], acc[1][g], acc[2][g], acc[3][g]) * _mm_set1_ps(scale);
            std::memcpy(scores + g * score_stride + key, &four, of * sizeof(float));
        }
    };
    const typename C::Number* rows[N];
    int key = 0;
    for (; key + N <= count; key += N) {
        const int64_t ahead = key * row_bytes + kKeyBytesAhead;
        if (ahead < count * row_bytes) fetch((const char*)k + ahead, N * row_bytes);
        fetch(v + int64_t(key) * dim, N * row_bytes);
        LLAMA_TP_UNROLL for (int i = 0; i < N; ++i) rows[i] = k + int64_t(key + i) * dim;
        score(key, N, rows);
    }
    if (key == count) return;
    for (int i = 0; i < N; ++i) rows[i] = k + int64_t(std::min(key + i, count - 1)) * dim;
    score(key, count - key, rows);
}

// Memory to fetch a line at a time, while something else is computed.
struct Ahead {
    const char *at = nullptr, *end = nullptr;

    void fetch_line() {
        if (at >= end) return;
        fetch(at);
        at += kLine;
    }
};

// values[query][d] += weights[query][key] * v[key][d], for G queries. Fetches a line ahead for each key and block.
template <class C, int G>
inline void add_values(const float* weights, int weight_stride, const typename C::Number* v, int count, int dim,
                       float* const (&values)[G], Ahead& ahead) {
    for (int d = 0; d < dim; d += 2 * W) {
        vf a[G], b[G];
        LLAMA_TP_UNROLL for (int g = 0; g < G; ++g) {
            a[g] = load<vf>(values[g] + d);
            b[g] = load<vf>(values[g] + d + W);
        }
        for (int key = 0; key < count; ++key) {
            ahead.fetch_line();
            vf va, vb;
            C::block(v + int64_t(key) * dim + d, std::min(2 * W, dim - d), va, vb);
            LLAMA_TP_UNROLL for (int g = 0; g < G; ++g) {
                const vf weight = splat(weights[g * weight_stride + key]);
                a[g] = fma(weight, va, a[g]);
                b[g] = fma(weight, vb, b[g]);
            }
        }
        LLAMA_TP_UNROLL for (int g = 0; g < G; ++g) {
            store(values[g] + d, a[g]);
            store(values[g] + d + W, b[g]);
        }
    }
}

constexpr int kScoreStride = kPart + 2 * W;
constexpr int kQueries = 4;  // that share reading a key

// G queries over one part of the keys: query g over keys begin .. min(ends[g], begin + kPart) - 1. q: (G, q_stride), in
// the cache's order. keys, values: of this kv head. scores: G * kScoreStride numbers. ahead: fetched meanwhile.
template <class C, int G>
void attend(const float* q, int q_stride, const typename C::Number* keys, const typename C::Number* values,
            const SlotRange* ranges, int begin, const int (&ends)[G], int dim, float scale, float* scores,
            const Partial (&out)[G], Ahead& ahead) {
    const int end = std::min(*std::max_element(ends, ends + G), begin + kPart);
    const int whole = round_up(end - begin, W);
    visit_slots(ranges, begin, end, [&](int position, int64_t slot, int length) {
        score_keys<C, G>(q, q_stride, keys + slot * dim, values + slot * dim, length, dim, scale,
                         scores + position - begin, kScoreStride);
    });
    float* sums[G];
    for (int g = 0; g < G; ++g) {
        float* row = scores + g * kScoreStride;
        const int count = std::clamp(ends[g] - begin, 0, end - begin);
        for (int key = count; key < whole; ++key) row[key] = -std::numeric_limits<float>::infinity();
        vf most = splat(-std::numeric_limits<float>::infinity());
        for (int key = 0; key < count; key += W) most = maximum(most, load<vf>(row + key));
        const float top = largest(most);
        vf total{};
        for (int key = round_up(count, W); key < whole; key += W) store(row + key, vf{});
        for (int key = 0; key < count; key += W) {
            vf weights = exponential(load<vf>(row + key) - top);
            if (key + W > count) weights = weights * load<vf>(kOnesThenZeros + W - (count - key));
            store(row + key, weights);
            total += weights;
        }
        *out[g].total = sum(total);
        *out[g].most = top;
        sums[g] = out[g].values;
        std::memset(sums[g], 0, round_up(dim, 2 * W) * sizeof(float));
    }
    visit_slots(ranges, begin, end, [&](int position, int64_t slot, int length) {
        add_values<C, G>(scores + position - begin, kScoreStride, values + slot * dim, length, dim, sums, ahead);
    });
}

}  // namespace llama_tp
