// The model and the steps that it computes. library.py mirrors the structs that Python fills.
//
// Legend: T tokens, D model dim, H heads, K kv heads, G = H / K, d head dim, F hidden dim, S sampled tokens.
#pragma once

#include <type_traits>

#include "elementwise.h"
#include "layer.h"
#include "tiled.h"

namespace llama_tp {

struct Layer {
    Linear wqkv, wo, w13, w2;
    const float *attention_norm, *ffn_norm;
    const float* qk_norm;  // (H + K, d), or null
};

struct Model {
    int32_t dim, hidden, heads, kv_heads, head_dim, layers;
    int32_t max_tokens, max_parts, is_bfloat16_cache, may_round;
    float eps;
    Workers* team;
    const Layer* layer;
    const float* norm;
    Linear output;
    void* cache;  // (layers, 2, K, slots, d)
    int64_t num_slots;
};

// A unit of work of a step of few tokens: a kv head and a part of a sequence's keys. A sequence's are those of its
// first part, then those of the next.
struct Sequence {
    int32_t first_token, num_tokens, start, first_range, first_unit;
};

struct Step {
    int32_t num_tokens, num_sampled, num_sequences, num_units, num_blocks;
    float* x;           // (T, D): the residual stream
    const float* rope;  // (T, d / 2, 2): cosine and sine
    const Sequence* sequences;
    const SlotRange* ranges;
    const int32_t* blocks;  // (blocks, 2): sequence, and its token that a block of kBlock begins with; of many tokens
    const int64_t* sampled;
    float* partial_sums;  // (T, D): what wo and w2 add to x, if other ranks must add theirs; else null
    float* logits;        // (S, output.rows)
    uint8_t* is_finite;   // (T)
};

enum Phase { kQKV, kAttention, kWO, kW13, kW2, kPhases };
constexpr int kOutputPhases = 2;  // behind those of the layers

// Whether attention of many tokens may round its weights to bfloat16, and does.
inline bool has_tiled_attention(const Model& model) {
    return kHasTiledAttention && model.is_bfloat16_cache && model.may_round && model.head_dim % (2 * W) == 0;
}

// The most inputs of a linear layer.
inline int widest(const Model& model) { return std::max({model.dim, model.hidden, model.heads * model.head_dim}); }

// One thread's memory, with that for products.
struct Scratch {
    Scratch(const Model& model, LayerScratch& layer) : layer(layer) {
        const int head = round_up(model.head_dim, 2 * W);
        row.resize(round_up(widest(model), 2 * kGroup));
        weights.resize(model.max_parts);
        queries.resize(int64_t(kQueries) * head);
        scores.resize(int64_t(kQueries) * kScoreStride);
        sums.resize(int64_t(2 * kQueries) * head);
        if (has_tiled_attention(model)) tiles.resize(model.heads / model.kv_heads, model.head_dim);
    }

    Buffer<float> row, queries, scores, sums, weights;
    LayerScratch& layer;
    TileScratch tiles;
};

// Calls work with min(count, kQueries) as a constant.
template <class Work>
inline void up_to_queries(int count, Work work) {
    static_assert(kQueries == 4);
    switch (count) {
        case 1: return work(std::integral_constant<int, 1>());
        case 2: return work(std::integral_constant<int, 2>());
        case 3: return work(std::integral_constant<int, 3>());
        default: return work(std::integral_constant<int, kQueries>());
    }
}

}  // namespace llama_tp
