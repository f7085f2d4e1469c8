// Attention of a block of tokens in bfloat16, as two matrix products: queries with keys, and weights with values. Keys
// and values are brought into the order of pairs once, for all queries of their kv head.
#pragma once

#include "attention.h"
#include "batch.h"

namespace llama_tp {

constexpr int kBlock = 16;      // tokens of a prompt that are computed together
constexpr int kTileTokens = 4;  // of a tile
constexpr int kTileKeys = 4 * W;

// One thread's memory.
struct TileScratch {
    Buffer<uint16_t> keys;     // (kPart / kTileKeys, dim / 2, kTileKeys, 2)
    Buffer<uint16_t> values;   // (kPart / 2, dim, 2)
    Buffer<float> scores;      // (kBlock, kScoreStride)
    Buffer<uint16_t> weights;  // the same in bfloat16, once they are weights
    Buffer<float> sums;        // (queries of a kv head + 1) * kBlock * dim
    Buffer<float> totals, most;

    void resize(int group, int dim) {
        keys.resize(kPart * dim);
        values.resize(kPart * dim);
        scores.resize(kBlock * kScoreStride);
        weights.resize(kBlock * kScoreStride);
        sums.resize(int64_t(group + 1) * kBlock * dim);
        totals.resize((group + 1) * kBlock);
        most.resize((group + 1) * kBlock);
    }
};

#if defined(__AVX512BF16__)
constexpr bool kHasTiledAttention = true;

// One block of tokens and the kv head that its queries attend to.
class TiledAttention {
  public:
    // dim: a multiple of 2 * W.
    TiledAttention(const uint16_t* keys, const uint16_t* values, const SlotRange* ranges, int dim, TileScratch& scratch)
        : keys_(keys), values_(values), ranges_(ranges), dim_(dim), scratch_(scratch) {}

    // `count` tokens from position `first` on; query(head, i) and output(head, i) are those of token i and query head.
    template <class Query, class Result>
    void attend(int first, int count, int group, Query query, Result output) {
        const int end = first + count;
        for (int begin = 0; begin < end; begin += kPart) {
            pack(begin, std::min(end, begin + kPart));
            for (int head = 0; head < group; ++head) {
                const int to = begin == 0 ? head : group;
                score(begin, first, count, [&](int i) { return query(head, i); });
                weigh(begin, first, count, to);
                add_values(begin, first, count, to);
                if (begin > 0) absorb(count, head, group);
            }
        }
        for (int head = 0; head < group; ++head) {
            for (int i = 0; i < count; ++i) {
                const vf scale = splat(1.0f / scratch_.totals[head * kBlock + i]);
                const float* from = sums(head, i);
                uint16_t* to = output(head, i);
                for (int k = 0; k < dim_; k += 2 * W) {
                    store_bf16(to + k, load<vf>(from + k) * scale, load<vf>(from + k + W) * scale);
                }
            }
        }
    }

  private:
    float* sums(int head, int i) const { return scratch_.sums.data() + (int64_t(head) * kBlock + i) * dim_; }

    // Keys of the part beginning at `begin` that are visible to the token at this position.
    static int visible(int begin, int position) { return std::clamp(position + 1 - begin, 0, kPart); }

    void pack(int begin, int end) {
        const uint16_t *key[kPart], *value[kPart];
        visit_slots(ranges_, begin, end, [&](int position, int64_t slot, int length) {
            for (int i = 0; i < length; ++i) {
                key[position - begin + i] = keys_ + (slot + i) * dim_;
                value[position - begin + i] = values_ + (slot + i) * dim_;
            }
        });
        const int count = end - begin;
        for (int first = 0; first < round_up(count, kTileKeys); first += W) {
            uint16_t* to = scratch_.keys.data() + first / kTileKeys * kTileKeys * dim_ + first % kTileKeys * 2;
            for (int k = 0; k < dim_; k += 2 * W) {
                __m512i block[W];
                LLAMA_TP_UNROLL for (int i = 0; i < W; ++i) {
                    block[i] = first + i < count ? load<__m512i>(key[first + i] + k) : __m512i{};
                }
                transpose(block);
                LLAMA_TP_UNROLL for (int pair = 0; pair < W; ++pair) {
                    store(to + (k / 2 + pair) * kTileKeys * 2, block[pair]);
                }
            }
        }
        alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                          8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        const __m512i low = load<__m512i>(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        for (int i = 0; i < count; i += 2) {
            uint16_t* to = scratch_.values.data() + i * dim_;
            for (int k = 0; k < dim_; k += 2 * W) {
                const __m512i a = load<__m512i>(value[i] + k);
                const __m512i b = i + 1 < count ? load<__m512i>(value[i + 1] + k) : __m512i{};
                store(to + 2 * k, _mm512_permutex2var_epi16(a, low, b));
                store(to + 2 * k + 2 * W, _mm512_permutex2var_epi16(a, high, b));
            }
        }
    }

    // scores[i][key] = q . k / sqrt(dim).
    template <class Query>
    void score(int begin, int first, int count, Query query) {
        const vf scale = splat(1.0f / std::sqrt(float(dim_)));
        for (int i = 0; i < count; i += kTileTokens) {
            const int last = std::min(count, i + kTileTokens) - 1;
            const uint16_t* q[kTileTokens];
            for (int t = 0; t < kTileTokens; ++t) q[t] = query(std::min(i + t, last));
            for (int key = 0; key < visible(begin, first + last); key += kTileKeys) {
                vf acc[kTileKeys / W][kTileTokens];
                pair_tile(scratch_.keys.data() + key * dim_, kTileKeys * 2, dim_ / 2, q, acc);
                LLAMA_TP_UNROLL for (int t = 0; t < kTileTokens; ++t) {
                    float* to = scratch_.scores.data() + (i + t) * kScoreStride + key;
                    LLAMA_TP_UNROLL for (int v = 0; v < kTileKeys / W; ++v) store(to + v * W, acc[v][t] * scale);
                }
            }
        }
    }

    // weights[i][key] = e^(score - most), 0 for keys that are not visible, up to those that any of the tile sees.
    void weigh(int begin, int first, int count, int to) {
        for (int i = 0; i < count; ++i) {
            const int seen = visible(begin, first + i),
                      tile_end = std::min(count, i / kTileTokens * kTileTokens + kTileTokens);
            const int end = round_up(visible(begin, first + tile_end - 1), 2 * W);
            float* row = scratch_.scores.data() + i * kScoreStride;
            uint16_t* weights = scratch_.weights.data() + i * kScoreStride;
            for (int key = seen; key < end; ++key) row[key] = -std::numeric_limits<float>::infinity();
            vf most = splat(-std::numeric_limits<float>::infinity());
            for (int key = 0; key < seen; key += W) most = maximum(most, load<vf>(row + key));
            const float top = largest(most);
            vf total{};
            for (int key = 0; key < end; key += 2 * W) {
                vf ab[2];
                LLAMA_TP_UNROLL for (int half = 0; half < 2; ++half) {
                    const vf score = load<vf>(row + key + half * W);
                    // exponential() is never 0.
                    const vf weight = exponential(score - top);
                    ab[half] = (vf)((vi)weight & (score > -std::numeric_limits<float>::infinity()));
                    total += ab[half];
                }
                store_bf16(weights + key, ab[0], ab[1]);
            }
            scratch_.totals[to * kBlock + i] = sum(total);
            scratch_.most[to * kBlock + i] = top;
        }
    }

    // sums[i] = weights[i][key] v[key].
    void add_values(int begin, int first, int count, int to) {
        for (int i = 0; i < count; i += kTileTokens) {
            const int last = std::min(count, i + kTileTokens) - 1;
            const uint16_t* weights[kTileTokens];
            for (int t = 0; t < kTileTokens; ++t)
                weights[t] = scratch_.weights.data() + std::min(i + t, last) * kScoreStride;
            const int pairs = (visible(begin, first + last) + 1) / 2;
            const auto add = [&](int k, auto vectors) {
                constexpr int V = vectors();
                vf acc[V][kTileTokens];
                pair_tile(scratch_.values.data() + 2 * k, 2 * dim_, pairs, weights, acc);
                for (int t = 0; t <= last - i; ++t) {
                    LLAMA_TP_UNROLL for (int v = 0; v < V; ++v) store(sums(to, i + t) + k + v * W, acc[v][t]);
                }
            };
            int k = 0;
            for (; k + 4 * W <= dim_; k += 4 * W) add(k, std::integral_constant<int, 4>());
            if (k < dim_) add(k, std::integral_constant<int, 2>());
        }
    }

    // Add a part's results, which are behind those of the heads, to those of the parts before it.
    void absorb(int count, int head, int part) {
        for (int i = 0; i < count; ++i) {
            float &most = scratch_.most[head * kBlock + i], &total = scratch_.totals[head * kBlock + i];
            const float of_part = scratch_.most[part * kBlock + i], top = std::fmax(most, of_part);
            if (of_part == -std::numeric_limits<float>::infinity()) continue;  // sees none of its keys
            const float old_scale = std::exp(most - top), scale = std::exp(of_part - top);
            float *to = sums(head, i), *from = sums(part, i);
            for (int k = 0; k < dim_; k += W) store(to + k, load<vf>(to + k) * old_scale + load<vf>(from + k) * scale);
            total = total * old_scale + scratch_.totals[part * kBlock + i] * scale;
            most = top;
        }
    }

    const uint16_t *const keys_, *const values_;
    const SlotRange* const ranges_;
    const int dim_;
    TileScratch& scratch_;
};
#else
constexpr bool kHasTiledAttention = false;
#endif

}  // namespace llama_tp
