// Attention in a step of many tokens.
#pragma once

#include "model.h"

namespace llama_tp {

// The attention of a step of many tokens, after its projections and before wo: phase 0 rotates queries and keys in
// place, and stores keys and values; phase 1 attends. A chunk is a block of one sequence's tokens, in phase 1 for
// one kv head.
template <class C>
class PromptAttention : public Job {
  public:
    using Number = typename C::Number;

    // qkv (T, H + 2 K, d), out (T, H, d).
    PromptAttention(const Model& model, int layer, const Step& step,
                    const std::vector<std::unique_ptr<Scratch>>& scratch, void* qkv, void* out)
        : model_(model),
          qk_norm_(model.layer[layer].qk_norm),
          step_(step),
          scratch_(scratch),
          qkv_((Number*)qkv),
          out_((Number*)out),
          stride_(round_up(model.head_dim, 2 * W)),
          group_(model.heads / model.kv_heads),
          size_(model.num_slots * model.head_dim),
          keys_((Number*)model.cache + int64_t(layer) * 2 * model.kv_heads * size_) {}

    int num_chunks(int phase) const override {
        return phase == 0 ? step_.num_blocks : step_.num_blocks * model_.kv_heads;
    }

    void compute(int phase, int chunk, int thread, bool) override {
        if (phase == 0) return store_block_of(step_.blocks + 2 * chunk);
        attend_block(step_.blocks + 2 * (chunk / model_.kv_heads), chunk % model_.kv_heads, *scratch_[thread]);
    }

  private:
    Number* head(int token, int index) const {
        return qkv_ + (int64_t(token) * (model_.heads + 2 * model_.kv_heads) + index) * model_.head_dim;
    }

    void store_block_of(const int32_t* block) {
        const Sequence& sequence = step_.sequences[block[0]];
        const int d = model_.head_dim, begin = sequence.start + block[1];
        const int end = std::min(begin + kBlock, sequence.start + sequence.num_tokens);
        visit_slots(step_.ranges + sequence.first_range, begin, end, [&](int position, int64_t slot, int count) {
            for (int i = 0; i < count; ++i) {
                const int token = sequence.first_token + position + i - sequence.start;
                for (int index = 0; index < model_.heads + model_.kv_heads; ++index) {
                    const float* norm = qk_norm_ == nullptr ? nullptr : qk_norm_ + int64_t(index) * d;
                    rotate_head<C>(head(token, index), norm, step_.rope + int64_t(token) * d, d, model_.eps);
                }
                for (int index = 0; index < model_.kv_heads; ++index) {
                    Number* key = keys_ + index * size_ + (slot + i) * d;
                    std::memcpy(key, head(token, model_.heads + index), d * sizeof(Number));
                    std::memcpy(key + model_.kv_heads * size_, head(token, model_.heads + model_.kv_heads + index),
                                d * sizeof(Number));
                }
            }
        });
    }

    void attend_block(const int32_t* block, int kv_head, Scratch& scratch) {
        const Sequence& sequence = step_.sequences[block[0]];
        const int count = std::min(kBlock, sequence.num_tokens - block[1]);
#if defined(__AVX512BF16__)
        if constexpr (std::is_same_v<C, BFloat16Cache>) {
            if (has_tiled_attention(model_)) {
                const uint16_t *keys = keys_ + kv_head * size_, *values = keys + model_.kv_heads * size_;
                const int token = sequence.first_token + block[1], d = model_.head_dim;
                TiledAttention attention(keys, values, step_.ranges + sequence.first_range, d, scratch.tiles);
                return attention.attend(
                    sequence.start + block[1], count, group_,
                    [&](int index, int i) { return head(token + i, kv_head * group_ + index); },
                    [&](int index, int i) {
                        return out_ + (int64_t(token + i) * model_.heads + kv_head * group_ + index) * d;
                    });
            }
        }
#endif
        for (int i = 0; i < count * group_; i += kQueries) {
            up_to_queries(count * group_ - i, [&](auto size) {
                constexpr int G = size();
                int tokens[G], heads[G], ends[G];
                for (int g = 0; g < G; ++g) {
                    const int at = block[1] + (i + g) % count;
                    tokens[g] = sequence.first_token + at;
                    heads[g] = kv_head * group_ + (i + g) / count;
                    ends[g] = sequence.start + at + 1;
                }
                attend_queries<G>(sequence, kv_head, tokens, heads, ends, scratch);
            });
        }
    }

    template <int G>
    void attend_queries(const Sequence& sequence, int kv_head, const int (&tokens)[G], const int (&heads)[G],
                        const int (&ends)[G], Scratch& scratch) {
        const int d = model_.head_dim, stride = stride_;
        float* q = scratch.queries.data();
        float totals[2][G], most[2][G];
        Partial sum[G], part[G];
        for (int g = 0; g < G; ++g) {
            float* to = q + g * stride;
            for (int k = 0; k < d; k += 2 * W) {
                vf a, b;
                C::block(head(tokens[g], heads[g]) + k, std::min(2 * W, d - k), a, b);
                store(to + k, a);
                store(to + k + W, b);
            }
            sum[g] = {scratch.sums.data() + g * stride, &totals[0][g], &most[0][g]};
            part[g] = {scratch.sums.data() + (kQueries + g) * stride, &totals[1][g], &most[1][g]};
        }
        const Number *keys = keys_ + kv_head * size_, *values = keys + model_.kv_heads * size_;
        const int end = *std::max_element(ends, ends + G);
        Ahead none;
        for (int begin = 0; begin < end; begin += kPart) {
            attend<C, G>(q, stride, keys, values, step_.ranges + sequence.first_range, begin, ends, d,
                         1.0f / std::sqrt(float(d)), scratch.scores.data(), begin == 0 ? sum : part, none);
            if (begin == 0) continue;
            for (int g = 0; g < G; ++g) {
                if (ends[g] > begin) absorb(sum[g], part[g], stride);
            }
        }
        for (int g = 0; g < G; ++g) {
            Number* to = out_ + (int64_t(tokens[g]) * model_.heads + heads[g]) * d;
            const float scale = 1.0f / *sum[g].total;
            for (int k = 0; k < d; k += 2 * W) {
                vf a, b;
                C::as_stored(load<vf>(sum[g].values + k) * scale, load<vf>(sum[g].values + k + W) * scale, a, b);
                store_block(to + k, std::min(2 * W, d - k), a, b);
            }
        }
    }

    // Add a part's result to that of the parts before it.
    static void absorb(const Partial& sum, const Partial& part, int stride) {
        const float most = std::fmax(*sum.most, *part.most);
        const float old_scale = std::exp(*sum.most - most), scale = std::exp(*part.most - most);
        for (int k = 0; k < stride; k += W) {
            store(sum.values + k, load<vf>(sum.values + k) * old_scale + load<vf>(part.values + k) * scale);
        }
        *sum.total = *sum.total * old_scale + *part.total * scale;
        *sum.most = most;
    }

    const Model& model_;
    const float* const qk_norm_;
    const Step& step_;
    const std::vector<std::unique_ptr<Scratch>>& scratch_;
    Number *const qkv_, *const out_;
    const int stride_, group_;
    const int64_t size_;  // of one head's keys or values
    Number* const keys_;  // of the layer
};

}  // namespace llama_tp
