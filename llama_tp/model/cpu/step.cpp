// One step of a Llama model for a few tokens, in C++: what llama_tp/model/transformer.py computes, with float32
// activations, in five phases a layer. llama_tp/model/cpu/library.py mirrors the structs.
//
// Legend: T tokens, D model dim, H heads, K kv heads, G = H / K, d head dim, F hidden dim, S sampled tokens.

#include "elementwise.h"
#include "layer.h"
#include "team.h"

namespace llama_tp {

struct Layer {
    Linear wqkv, wo, w13, w2;
    const float *attention_norm, *ffn_norm;
    const float* qk_norm;  // (H + K, d), or null
};

struct Model {
    int32_t dim, hidden, heads, kv_heads, head_dim, layers;
    int32_t max_tokens, max_parts, is_bfloat16_cache, in_bfloat16;
    float eps;
    Team* team;
    const Layer* layer;
    const float* norm;
    Linear output;
    void* cache;        // (layers, 2, K, slots, d)
    int64_t num_slots;
};

struct Sequence {
    int32_t first_token, num_tokens, start, first_range;
};

struct Step {
    int32_t num_tokens, num_sampled, num_units, num_blocks;
    float* x;             // (T, D): the residual stream
    const float* rope;    // (T, d / 2, 2): cosine and sine
    const Sequence* sequences;
    const SlotRange* ranges;
    const int32_t* units; // (units, 3): sequence, kv head, part; of a step of few tokens
    const int32_t* blocks;// (blocks, 2): sequence, and its token that a block of kBlock begins with; of other steps
    const int64_t* sampled;
    float* partial_sums;  // (T, D): what wo and w2 add to x, if other ranks must add theirs; else null
    float* logits;        // (S, output.rows)
    uint8_t* is_finite;   // (T)
};

constexpr int kBlock = 16;

enum Phase { kQKV, kAttention, kWO, kW13, kW2, kPhases };

class Context : public Job {
  public:
    explicit Context(const Model& model)
        : model_(model),
          layers_(model.layer, model.layer + model.layers),
          head_stride_(round_up(model.head_dim, 2 * W)),
          group_(model.heads / model.kv_heads),
          qkv_(int64_t(model.max_tokens) * (model.heads + 2 * model.kv_heads) * model.head_dim),
          gated_(int64_t(model.max_tokens) * 2 * model.hidden),
          partial_values_(int64_t(model.max_tokens) * model.heads * model.max_parts * head_stride_),
          partial_sums_(int64_t(model.max_tokens) * model.heads * model.max_parts * 2),
          scratch_(model.team->num_threads()),
          threads_(model.team->num_threads()) {
        const int widest = std::max({model.dim, model.hidden, model.heads * model.head_dim});
        const int stride = round_up(widest, 2 * kGroup);
        for (Scratch& one : scratch_) {
            one.row.resize(stride);
            one.layer.resize(model.max_tokens, stride);
            one.queries.resize(int64_t(kQueries) * head_stride_);
            one.scores.resize(int64_t(kQueries) * kScoreStride);
            one.sums.resize(int64_t(2 * kQueries) * head_stride_);
        }
    }

    void run(const Step& step, int first, int end) {
        step_ = step;
        model_.team->run(*this, first, end);
    }

    // qkv: the layer's projections; out (T, H, d).
    void attend_prompts(int layer, const Step& step, void* qkv, void* out) {
        const auto attend_in = [&](auto format) {
            using Number = typename decltype(format)::Number;
            PromptAttention<decltype(format)> job(*this, layers_[layer], layer, step, (Number*)qkv, (Number*)out);
            model_.team->run(job, 0, 2);
        };
        if (model_.is_bfloat16_cache) {
            attend_in(BFloat16Cache());
        } else {
            attend_in(Float32Cache());
        }
    }

    int num_chunks(int phase) const override {
        const int layer = phase / kPhases;
        if (layer == model_.layers) {
            return phase % kPhases == 0 ? step_.num_tokens : step_.num_sampled ? chunks(model_.output.rows) : 0;
        }
        switch (phase % kPhases) {
            case kQKV: return chunks(layers_[layer].wqkv.rows);
            case kAttention: return step_.num_units;
            case kW13: return chunks(model_.hidden);
            default: return chunks(model_.dim);
        }
    }

    void compute(int phase, int chunk, int thread, bool is_first) override {
        Scratch& scratch = scratch_[thread];
        if (phase / kPhases == model_.layers) {
            if (phase % kPhases == 0) return check(chunk);
            return logits(chunk, scratch, is_first);
        }
        const Layer& layer = layers_[phase / kPhases];
        switch (phase % kPhases) {
            case kQKV: return project(layer, chunk, scratch, is_first);
            case kAttention:
                return model_.is_bfloat16_cache ? attention<BFloat16Cache>(layer, phase / kPhases, chunk, scratch)
                                                : attention<Float32Cache>(layer, phase / kPhases, chunk, scratch);
            case kWO: return project_out(layer, chunk, scratch, is_first);
            case kW13: return gate_up(layer, chunk, scratch, is_first);
            case kW2: return down(layer, chunk, scratch, is_first);
        }
    }

  private:
    struct Scratch {
        std::vector<float> row, queries, scores, sums;
        LayerScratch layer;
    };

    int chunks(int64_t rows) const { return num_chunks_of(rows, threads_); }
    void rows_of(int64_t rows, int chunk, int64_t& begin, int64_t& end) const {
        rows_of_chunk(rows, threads_, chunk, begin, end);
    }

    // Lay out the inputs of a linear layer for this thread: read(token) returns a row of its columns.
    template <class Read>
    void prepare(const Linear& linear, int tokens, Scratch& scratch, Read read) {
        scratch.layer.prepare(linear, tokens, model_.in_bfloat16, read);
    }

    void multiply_rows(const Linear& linear, int64_t begin, int64_t end, Scratch& scratch, const Output& out) {
        scratch.layer.multiply(linear, begin, end, out);
    }

    // x / sqrt(mean(x^2) + eps) * weight. `to` may be x.
    static void normalize(const float* x, const float* weight, int dim, float eps, float* to) {
        vf squares{};
        int k = 0;
        for (; k + W <= dim; k += W) squares = fma(load<vf>(x + k), load<vf>(x + k), squares);
        float total = sum(squares);
        for (int i = k; i < dim; ++i) total += x[i] * x[i];
        const float scale = 1.0f / std::sqrt(total / dim + eps);
        for (k = 0; k + W <= dim; k += W) store(to + k, load<vf>(x + k) * scale * load<vf>(weight + k));
        for (; k < dim; ++k) to[k] = x[k] * scale * weight[k];
    }

    const float* normalized(int token, const float* weight, Scratch& scratch) const {
        normalize(step_.x + int64_t(token) * model_.dim, weight, model_.dim, model_.eps, scratch.row.data());
        return scratch.row.data();
    }

    void project(const Layer& layer, int chunk, Scratch& scratch, bool is_first) {
        if (is_first) {
            prepare(layer.wqkv, step_.num_tokens, scratch, [&](int token) {
                const float* row = normalized(token, layer.attention_norm, scratch);
                // A NaN in the cache would reach every reader of its slot, even with a weight of zero.
                for (int k = 0; k < model_.dim; ++k) scratch.row[k] = std::isfinite(row[k]) ? row[k] : 0.0f;
                return row;
            });
        }
        int64_t begin, end;
        rows_of(layer.wqkv.rows, chunk, begin, end);
        multiply_rows(layer.wqkv, begin, end, scratch, {qkv_.data(), layer.wqkv.rows, false});
    }

    const float* head(int token, int index) const {
        return qkv_.data() + (int64_t(token) * (model_.heads + 2 * model_.kv_heads) + index) * model_.head_dim;
    }

    // A head's query or key, normalized if the model has such norms, and rotated.
    void rotated(const Layer& layer, int token, int index, float* to) const {
        const int d = model_.head_dim;
        const float* from = head(token, index);
        if (layer.qk_norm != nullptr) {
            normalize(from, layer.qk_norm + int64_t(index) * d, d, model_.eps, to);
            from = to;
        }
        const float* rope = step_.rope + int64_t(token) * d;
        for (int i = 0; i < d; i += 2) {
            const float a = from[i], b = from[i + 1];
            to[i] = a * rope[i] - b * rope[i + 1];
            to[i + 1] = a * rope[i + 1] + b * rope[i];
        }
    }

    Partial partial(int token, int index, int part) {
        const int64_t at = (int64_t(token) * model_.heads + index) * model_.max_parts + part;
        return {&partial_values_[at * head_stride_], &partial_sums_[at * 2], &partial_sums_[at * 2 + 1]};
    }

    template <class C>
    void attention(const Layer& layer, int layer_index, int unit, Scratch& scratch) {
        const int32_t* of_unit = step_.units + 3 * unit;
        const Sequence& sequence = step_.sequences[of_unit[0]];
        const int kv_head = of_unit[1], part = of_unit[2], d = model_.head_dim;
        const SlotRange* ranges = step_.ranges + sequence.first_range;
        using Number = typename C::Number;
        const int64_t size = int64_t(model_.num_slots) * d;  // of one head
        Number* keys = (Number*)model_.cache + (int64_t(layer_index) * 2 * model_.kv_heads + kv_head) * size;
        Number* values = keys + model_.kv_heads * size;
        const int begin = part * kPart, end = begin + kPart, stop = sequence.start + sequence.num_tokens;
        float* q = scratch.queries.data();
        visit_slots(ranges, std::max(begin, int(sequence.start)), std::min(end, stop), [&](int position, int64_t slot, int count) {
            for (int i = 0; i < count; ++i) {
                const int token = sequence.first_token + position + i - sequence.start;
                rotated(layer, token, model_.heads + kv_head, q);
                const float* v = head(token, model_.heads + model_.kv_heads + kv_head);
                for (int j = 0; j < d; ++j) keys[(slot + i) * d + j] = C::number(q[j]);
                for (int j = 0; j < d; ++j) values[(slot + i) * d + j] = C::number(v[j]);
            }
        });
        for (int i = 0; i < sequence.num_tokens; ++i) {
            const int visible = std::min(end, int(sequence.start) + i + 1);
            if (begin >= visible) continue;
            const int token = sequence.first_token + i;
            for (int g = 0; g < group_; g += kQueries) {
                const int first = kv_head * group_ + g;
                const auto attend_with = [&](auto count) {
                    constexpr int G = count();
                    Partial out[G];
                    int ends[G];
                    std::fill_n(ends, G, visible);
                    for (int query = 0; query < G; ++query) {
                        rotated(layer, token, first + query, q + query * head_stride_);
                        reorder<C>(q + query * head_stride_);
                        out[query] = partial(token, first + query, part);
                    }
                    attend<C, G>(q, head_stride_, keys, values, ranges, begin, ends, d, 1.0f / std::sqrt(float(d)),
                                 scratch.scores.data(), out);
                };
                up_to_queries(group_ - g, attend_with);
            }
        }
    }

    // Calls work with min(count, kQueries) as a constant.
    template <class Work>
    static void up_to_queries(int count, Work work) {
        static_assert(kQueries == 4);
        switch (count) {
            case 1: return work(std::integral_constant<int, 1>());
            case 2: return work(std::integral_constant<int, 2>());
            case 3: return work(std::integral_constant<int, 3>());
            default: return work(std::integral_constant<int, kQueries>());
        }
    }

    // A query, in the order of the cache's blocks.
    template <class C>
    void reorder(float* to) const {
        std::memset(to + model_.head_dim, 0, (head_stride_ - model_.head_dim) * sizeof(float));
        for (int k = 0; k < head_stride_; k += 2 * W) {
            vf first, second;
            C::in_order(load<vf>(to + k), load<vf>(to + k + W), first, second);
            store(to + k, first);
            store(to + k + W, second);
        }
    }

    // The attention output of a token (H, d): its parts, weighted by their sums of exponentials.
    template <class C>
    void merge(int token, int position, float* to) {
        const int parts = position / kPart + 1, d = model_.head_dim;
        for (int index = 0; index < model_.heads; ++index, to += d) {
            float most = -std::numeric_limits<float>::infinity(), total = 0.0f;
            for (int part = 0; part < parts; ++part) most = std::fmax(most, *partial(token, index, part).most);
            for (int part = 0; part < parts; ++part) {
                const Partial one = partial(token, index, part);
                total += *one.total * std::exp(*one.most - most);
            }
            for (int k = 0; k < d; k += 2 * W) {
                vf first{}, second{}, a, b;
                for (int part = 0; part < parts; ++part) {
                    const Partial one = partial(token, index, part);
                    const float weight = std::exp(*one.most - most) / total;
                    first = first + load<vf>(one.values + k) * weight;
                    second = second + load<vf>(one.values + k + W) * weight;
                }
                C::as_stored(first, second, a, b);
                float both[2 * W];
                store(both, a);
                store(both + W, b);
                std::memcpy(to + k, both, std::min(2 * W, d - k) * sizeof(float));
            }
        }
    }

    // The attention of a step of many tokens, after its projections and before wo: phase 0 rotates queries and keys in
    // place, and stores keys and values; phase 1 attends. A chunk is a block of one sequence's tokens, in phase 1 for
    // one kv head.
    template <class C>
    class PromptAttention : public Job {
      public:
        using Number = typename C::Number;

        PromptAttention(Context& context, const Layer& layer, int layer_index, const Step& step, Number* qkv, Number* out)
            : context_(context), model_(context.model_), layer_(layer), step_(step), qkv_(qkv), out_(out),
              size_(model_.num_slots * model_.head_dim),
              keys_((Number*)model_.cache + int64_t(layer_index) * 2 * model_.kv_heads * size_) {}

        int num_chunks(int phase) const override {
            return phase == 0 ? step_.num_blocks : step_.num_blocks * model_.kv_heads;
        }

        void compute(int phase, int chunk, int thread, bool) override {
            if (phase == 0) return store_block_of(step_.blocks + 2 * chunk);
            attend_block(step_.blocks + 2 * (chunk / model_.kv_heads), chunk % model_.kv_heads, context_.scratch_[thread]);
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
                        const float* norm = layer_.qk_norm == nullptr ? nullptr : layer_.qk_norm + int64_t(index) * d;
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
            for (int i = 0; i < count * context_.group_; i += kQueries) {
                up_to_queries(count * context_.group_ - i, [&](auto size) {
                    constexpr int G = size();
                    int tokens[G], heads[G], ends[G];
                    for (int g = 0; g < G; ++g) {
                        const int at = block[1] + (i + g) % count;
                        tokens[g] = sequence.first_token + at;
                        heads[g] = kv_head * context_.group_ + (i + g) / count;
                        ends[g] = sequence.start + at + 1;
                    }
                    attend_queries<G>(sequence, kv_head, tokens, heads, ends, scratch);
                });
            }
        }

        template <int G>
        void attend_queries(const Sequence& sequence, int kv_head, const int (&tokens)[G], const int (&heads)[G],
                            const int (&ends)[G], Scratch& scratch) {
            const int d = model_.head_dim, stride = context_.head_stride_;
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
            for (int begin = 0; begin < end; begin += kPart) {
                attend<C, G>(q, stride, keys, values, step_.ranges + sequence.first_range, begin, ends, d,
                             1.0f / std::sqrt(float(d)), scratch.scores.data(), begin == 0 ? sum : part);
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

        Context& context_;
        const Model& model_;
        const Layer& layer_;
        const Step& step_;
        Number *const qkv_, *const out_;
        const int64_t size_;  // of one head's keys or values
        Number* const keys_;  // of the layer
    };

    int position(int token) const {
        const Sequence* sequence = step_.sequences;
        while (token >= sequence->first_token + sequence->num_tokens) ++sequence;
        return sequence->start + token - sequence->first_token;
    }

    Output residual() const {
        if (step_.partial_sums != nullptr) return {step_.partial_sums, model_.dim, false};
        return {step_.x, model_.dim, true};
    }

    void project_out(const Layer& layer, int chunk, Scratch& scratch, bool is_first) {
        if (is_first) {
            prepare(layer.wo, step_.num_tokens, scratch, [&](int token) {
                if (model_.is_bfloat16_cache) {
                    merge<BFloat16Cache>(token, position(token), scratch.row.data());
                } else {
                    merge<Float32Cache>(token, position(token), scratch.row.data());
                }
                return scratch.row.data();
            });
        }
        int64_t begin, end;
        rows_of(layer.wo.rows, chunk, begin, end);
        multiply_rows(layer.wo, begin, end, scratch, residual());
    }

    // SwiGLU of hidden columns: the gate's rows come first in w13, then those of up.
    void gate_up(const Layer& layer, int chunk, Scratch& scratch, bool is_first) {
        if (is_first) {
            prepare(layer.w13, step_.num_tokens, scratch, [&](int token) { return normalized(token, layer.ffn_norm, scratch); });
        }
        int64_t begin, end;
        const int64_t hidden = model_.hidden;
        rows_of(hidden, chunk, begin, end);
        const Output out{gated_.data(), 2 * hidden, false};
        multiply_rows(layer.w13, begin, end, scratch, out);
        multiply_rows(layer.w13, hidden + begin, hidden + end, scratch, out);
        for (int token = 0; token < step_.num_tokens; ++token) {
            float* gate = gated_.data() + int64_t(token) * 2 * hidden;
            const float* up = gate + hidden;
            for (int64_t k = begin; k < end; k += W) {
                const int count = int(std::min<int64_t>(W, end - k));
                const vf g = first_floats(gate + k, count);
                const vf gated = g / (1.0f + exponential(-g)) * first_floats(up + k, count);
                std::memcpy(gate + k, &gated, count * sizeof(float));
            }
        }
    }

    void down(const Layer& layer, int chunk, Scratch& scratch, bool is_first) {
        if (is_first) {
            prepare(layer.w2, step_.num_tokens, scratch, [&](int token) { return gated_.data() + int64_t(token) * 2 * model_.hidden; });
        }
        int64_t begin, end;
        rows_of(layer.w2.rows, chunk, begin, end);
        multiply_rows(layer.w2, begin, end, scratch, residual());
    }

    void check(int token) {
        const float* x = step_.x + int64_t(token) * model_.dim;
        bool is_finite = true;
        for (int k = 0; k < model_.dim; ++k) is_finite &= std::isfinite(x[k]);
        step_.is_finite[token] = is_finite;
    }

    void logits(int chunk, Scratch& scratch, bool is_first) {
        if (is_first) {
            prepare(model_.output, step_.num_sampled, scratch,
                    [&](int index) { return normalized(int(step_.sampled[index]), model_.norm, scratch); });
        }
        int64_t begin, end;
        rows_of(model_.output.rows, chunk, begin, end);
        multiply_rows(model_.output, begin, end, scratch, {step_.logits, model_.output.rows, false});
    }

    const Model model_;
    const std::vector<Layer> layers_;
    const int head_stride_, group_;
    std::vector<float> qkv_, gated_, partial_values_, partial_sums_;
    std::vector<Scratch> scratch_;
    const int threads_;
    Step step_{};
};

}  // namespace llama_tp

namespace {

// Calls work with the format of activations.
template <class Work>
void with_format(bool is_bfloat16, Work work) {
    if (is_bfloat16) {
        work(llama_tp::BFloat16Cache());
    } else {
        work(llama_tp::Float32Cache());
    }
}

}  // namespace

extern "C" {

int32_t llama_tp_keys_per_part() { return llama_tp::kPart; }

int32_t llama_tp_tokens_per_block() { return llama_tp::kBlock; }

void* llama_tp_create_team(int32_t threads) { return new llama_tp::Team(threads); }

void llama_tp_destroy_team(void* team) { delete static_cast<llama_tp::Team*>(team); }

// The team must outlive the model.
void* llama_tp_create_model(const llama_tp::Model* model) { return new llama_tp::Context(*model); }

void llama_tp_destroy_model(void* context) { delete static_cast<llama_tp::Context*>(context); }

// y (tokens, rows) = x (tokens, columns) W^T + b.
void llama_tp_multiply(void* team, const llama_tp::Linear* linear, const float* x, int32_t tokens, int32_t in_bfloat16, float* y) {
    auto& threads = *static_cast<llama_tp::Team*>(team);
    llama_tp::Product product(*linear, x, tokens, in_bfloat16, y, threads.num_threads());
    threads.run(product, 0, 1);
}

// The following work on T tokens whose activations are bfloat16 or float32.

// x (T, dim) += y, if there is one; then to = RMSNorm(x), in y's format.
void llama_tp_add_and_normalize(void* team, int32_t is_bfloat16, int32_t tokens, int32_t dim, float* x, const void* y,
                                const float* weight, float eps, int32_t zero_nonfinite, void* to) {
    with_format(is_bfloat16, [=](auto format) {
        using Number = typename decltype(format)::Number;
        llama_tp::for_each_token(*static_cast<llama_tp::Team*>(team), tokens, [=](int64_t token) {
            const Number* added = y == nullptr ? nullptr : (const Number*)y + token * dim;
            llama_tp::add_and_normalize<decltype(format)>(x + token * dim, added, weight, dim, eps, zero_nonfinite,
                                                          (Number*)to + token * dim);
        });
    });
}

// From the projections qkv (T, H + 2 K, d), which it overwrites, to the attention's output (T, H, d).
void llama_tp_attend(void* context, int32_t layer, const llama_tp::Step* step, void* qkv, void* out) {
    static_cast<llama_tp::Context*>(context)->attend_prompts(layer, *step, qkv, out);
}

// to (T, hidden) = silu(gate) * up, for gate_up (T, 2 * hidden).
void llama_tp_gate(void* team, int32_t is_bfloat16, int32_t tokens, int32_t hidden, const void* gate_up, void* to) {
    with_format(is_bfloat16, [=](auto format) {
        using Number = typename decltype(format)::Number;
        llama_tp::for_each_token(*static_cast<llama_tp::Team*>(team), tokens, [=](int64_t token) {
            const Number* gate = (const Number*)gate_up + token * 2 * hidden;
            llama_tp::gate<decltype(format)>(gate, gate + hidden, hidden, (Number*)to + token * hidden);
        });
    });
}

void llama_tp_widen(void* team, const llama_tp::Linear* linear, int64_t begin, int64_t end, uint16_t* to) {
    llama_tp::Widening widening(*linear, begin, end, to);
    static_cast<llama_tp::Team*>(team)->run(widening, 0, 1);
}

// Phases first .. end - 1 of 5 * layers + 2.
void llama_tp_run(void* context, const llama_tp::Step* step, int32_t first, int32_t end) {
    static_cast<llama_tp::Context*>(context)->run(*step, first, end);
}
}
