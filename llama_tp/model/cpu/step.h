// A step of few tokens as a whole: what llama_tp/model/transformer.py computes, with float32 activations, in five
// phases a layer.
#pragma once

#include "prompt.h"

namespace llama_tp {

// Whether a team can count the work of the model's steps.
inline bool fits_team(const Model& model) {
    const int64_t phases = int64_t(kPhases) * model.layers + kOutputPhases;
    const int64_t units = int64_t(model.max_tokens) * model.kv_heads * model.max_parts;
    return phases <= Team::kMaxPhases && units <= Team::kMaxChunks;
}

class Context : public Job {
  public:
    // Allocates all that steps need. Throws std::bad_alloc.
    explicit Context(const Model& model)
        : layers_(model.layer, model.layer + model.layers),
          model_(model),
          head_stride_(round_up(model.head_dim, 2 * W)),
          group_(model.heads / model.kv_heads),
          qkv_(int64_t(model.max_tokens) * (model.heads + 2 * model.kv_heads) * model.head_dim),
          gated_(int64_t(model.max_tokens) * 2 * model.hidden),
          partial_values_(int64_t(model.max_tokens) * model.heads * model.max_parts * head_stride_),
          partial_sums_(int64_t(model.max_tokens) * model.heads * model.max_parts * 2),
          threads_(model.team->team.num_threads()),
          scratch_(threads_) {
        Workers& workers = *model.team;
        workers.reserve(model.max_tokens, widest(model));
        if (kMultipliesBatches && model.is_bfloat16_cache && model.may_round) workers.reserve_batches(widest(model));
        workers.team.in_each_thread(
            [&](int thread) { scratch_[thread] = std::make_unique<Scratch>(model, workers[thread]); });
        model_.layer = layers_.data();
    }

    void run(const Step& step, int first, int end) {
        step_ = step;
        model_.team->team.run(*this, first, end);
    }

    // Of a step of many tokens: see PromptAttention.
    void attend_prompts(int layer, const Step& step, void* qkv, void* out) {
        const auto attend_in = [&](auto format) {
            PromptAttention<decltype(format)> job(model_, layer, step, scratch_, qkv, out);
            model_.team->team.run(job, 0, 2);
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
        Scratch& scratch = *scratch_[thread];
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

    void fetch_ahead(int phase, int chunk, bool is_first) const override {
        const int layer = phase / kPhases;
        if (layer < model_.layers && phase % kPhases == kAttention) {
            if (!is_first) return;  // attention to the chunk before fetches its keys
            Ahead keys =
                model_.is_bfloat16_cache ? keys_of<BFloat16Cache>(layer, chunk) : keys_of<Float32Cache>(layer, chunk);
            return fetch(keys.at, std::min<int64_t>(keys.end - keys.at, kKeyBytesAhead));
        }
        if (!is_first) return;  // a product has already fetched the rows that follow its own
        const auto fetch_chunk = [&](const Linear& linear, int64_t rows) {
            int64_t begin, end;
            rows_of(rows, chunk, begin, end);
            fetch_rows(linear, begin);
        };
        if (layer == model_.layers) {
            if (phase % kPhases > 0) fetch_chunk(model_.output, model_.output.rows);
            return;
        }
        switch (phase % kPhases) {
            case kQKV: return fetch_chunk(layers_[layer].wqkv, layers_[layer].wqkv.rows);
            case kWO: return fetch_chunk(layers_[layer].wo, model_.dim);
            case kW13: return fetch_chunk(layers_[layer].w13, model_.hidden);
            case kW2: return fetch_chunk(layers_[layer].w2, model_.dim);
        }
    }

  private:
    RowChunks row_chunks(int64_t rows) const { return {rows, step_.num_tokens, bool(model_.may_round), threads_}; }
    int chunks(int64_t rows) const { return row_chunks(rows).count(); }
    void rows_of(int64_t rows, int chunk, int64_t& begin, int64_t& end) const {
        row_chunks(rows).rows_of(chunk, begin, end);
    }

    // Lay out the inputs of a linear layer for this thread: read(token) returns a row of its columns.
    template <class Read>
    void prepare(const Linear& linear, int tokens, Scratch& scratch, Read read) {
        scratch.layer.prepare(linear, tokens, model_.may_round, read);
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

    // A part of a sequence's keys, of one kv head.
    template <class C>
    struct Unit {
        Unit(const Model& model, const Step& step, int layer, int index)
            : sequence(of_unit(step, index)),
              ranges(step.ranges + sequence.first_range),
              kv_head((index - sequence.first_unit) % model.kv_heads),
              part((index - sequence.first_unit) / model.kv_heads),
              begin(part * kPart),
              end(std::min(begin + kPart, sequence.start + sequence.num_tokens)) {
            const int64_t size = model.num_slots * model.head_dim;  // of one head
            keys = (typename C::Number*)model.cache + (int64_t(layer) * 2 * model.kv_heads + kv_head) * size;
            values = keys + model.kv_heads * size;
        }

        static const Sequence& of_unit(const Step& step, int index) {
            const auto begins_behind = [](int index, const Sequence& one) { return index < one.first_unit; };
            return std::upper_bound(step.sequences, step.sequences + step.num_sequences, index, begins_behind)[-1];
        }

        const Sequence& sequence;
        const SlotRange* ranges;
        const int kv_head, part, begin, end;
        typename C::Number *keys, *values;
    };

    // The first keys of a unit, as far as they are contiguous.
    template <class C>
    Ahead keys_of(int layer, int index) const {
        const Unit<C> unit(model_, step_, layer, index);
        const int row_bytes = model_.head_dim * sizeof(typename C::Number);
        Ahead ahead;
        visit_slots(unit.ranges, unit.begin, unit.end, [&](int position, int64_t slot, int count) {
            if (position > unit.begin) return;
            ahead.at = (const char*)(unit.keys + slot * model_.head_dim);
            ahead.end = ahead.at + std::min<int64_t>(int64_t(count) * row_bytes, kKeyBytesOfNext);
        });
        return ahead;
    }

    template <class C>
    void attention(const Layer& layer, int layer_index, int index, Scratch& scratch) {
        const Unit<C> unit(model_, step_, layer_index, index);
        const Sequence& sequence = unit.sequence;
        const int d = model_.head_dim;
        float* q = scratch.queries.data();
        Ahead ahead = index + 1 < step_.num_units ? keys_of<C>(layer_index, index + 1) : Ahead();
        visit_slots(unit.ranges, std::max(unit.begin, int(sequence.start)), unit.end,
                    [&](int position, int64_t slot, int count) {
                        for (int i = 0; i < count; ++i) {
                            const int token = sequence.first_token + position + i - sequence.start;
                            rotated(layer, token, model_.heads + unit.kv_head, q);
                            const float* v = head(token, model_.heads + model_.kv_heads + unit.kv_head);
                            for (int j = 0; j < d; ++j) unit.keys[(slot + i) * d + j] = C::number(q[j]);
                            for (int j = 0; j < d; ++j) unit.values[(slot + i) * d + j] = C::number(v[j]);
                        }
                    });
        for (int i = 0; i < sequence.num_tokens; ++i) {
            const int visible = std::min(unit.begin + kPart, int(sequence.start) + i + 1);
            if (unit.begin >= visible) continue;
            const int token = sequence.first_token + i;
            for (int g = 0; g < group_; g += kQueries) {
                const int first = unit.kv_head * group_ + g;
                const auto attend_with = [&](auto count) {
                    constexpr int G = count();
                    Partial out[G];
                    int ends[G];
                    std::fill_n(ends, G, visible);
                    for (int query = 0; query < G; ++query) {
                        rotated(layer, token, first + query, q + query * head_stride_);
                        reorder<C>(q + query * head_stride_);
                        out[query] = partial(token, first + query, unit.part);
                    }
                    attend<C, G>(q, head_stride_, unit.keys, unit.values, unit.ranges, unit.begin, ends, d,
                                 1.0f / std::sqrt(float(d)), scratch.scores.data(), out, ahead);
                };
                up_to_queries(group_ - g, attend_with);
            }
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
    void merge(int token, int position, Scratch& scratch) {
        const int parts = position / kPart + 1, d = model_.head_dim;
        float* to = scratch.row.data();
        for (int index = 0; index < model_.heads; ++index, to += d) {
            float most = -std::numeric_limits<float>::infinity(), total = 0.0f;
            for (int part = 0; part < parts; ++part) most = std::fmax(most, *partial(token, index, part).most);
            for (int part = 0; part < parts; ++part) {
                const Partial one = partial(token, index, part);
                scratch.weights[part] = std::exp(*one.most - most);
                total += *one.total * scratch.weights[part];
            }
            for (int k = 0; k < d; k += 2 * W) {
                vf first{}, second{}, a, b;
                for (int part = 0; part < parts; ++part) {
                    const float* values = partial(token, index, part).values + k;
                    const vf weight = splat(scratch.weights[part] / total);
                    first = fma(load<vf>(values), weight, first);
                    second = fma(load<vf>(values + W), weight, second);
                }
                C::as_stored(first, second, a, b);
                store_block(to + k, std::min(2 * W, d - k), a, b);
            }
        }
    }

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
                    merge<BFloat16Cache>(token, position(token), scratch);
                } else {
                    merge<Float32Cache>(token, position(token), scratch);
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
            prepare(layer.w13, step_.num_tokens, scratch,
                    [&](int token) { return normalized(token, layer.ffn_norm, scratch); });
        }
        int64_t begin, end;
        const int64_t hidden = model_.hidden;
        rows_of(hidden, chunk, begin, end);
        const Output out{gated_.data(), 2 * hidden, false};
        fetch_rows(layer.w13, hidden + begin);
        multiply_rows(layer.w13, begin, end, scratch, out);
        multiply_rows(layer.w13, hidden + begin, hidden + end, scratch, out);
        for (int token = 0; token < step_.num_tokens; ++token) {
            float* gate = gated_.data() + int64_t(token) * 2 * hidden;
            const float* up = gate + hidden;
            for (int64_t k = begin; k < end; k += W) {
                const int count = int(std::min<int64_t>(W, end - k));
                const vf g = first_floats(gate + k, count);
                const vf gated = g / (1.0f + exponential(-g)) * first_floats(up + k, count);
                store_first(gate + k, count, gated);
            }
        }
    }

    void down(const Layer& layer, int chunk, Scratch& scratch, bool is_first) {
        if (is_first) {
            prepare(layer.w2, step_.num_tokens, scratch,
                    [&](int token) { return gated_.data() + int64_t(token) * 2 * model_.hidden; });
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

    const std::vector<Layer> layers_;
    Model model_;
    const int head_stride_, group_;
    Buffer<float> qkv_, gated_, partial_values_, partial_sums_;
    const int threads_;
    std::vector<std::unique_ptr<Scratch>> scratch_;
    Step step_{};
};

}  // namespace llama_tp
