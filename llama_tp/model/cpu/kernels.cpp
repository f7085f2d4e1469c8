// What Python calls: see library.py and kernels.py.

#include <exception>

#include "step.h"

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

// What is created, or null: an exception must not reach Python.
template <class Create>
void* or_null(Create create) {
    try {
        return create();
    } catch (const std::exception&) {
        return nullptr;
    }
}

// Whether there is the memory.
template <class Reserve>
bool has(Reserve reserve) {
    try {
        reserve();
        return true;
    } catch (const std::exception&) {
        return false;
    }
}

llama_tp::Workers& workers_of(void* team) { return *static_cast<llama_tp::Workers*>(team); }

}  // namespace

extern "C" {

int32_t llama_tp_keys_per_part() { return llama_tp::kPart; }

int32_t llama_tp_tokens_per_block() { return llama_tp::kBlock; }

// Null if there are not enough threads or memory.
void* llama_tp_create_team(int32_t threads) {
    return or_null([=] { return new llama_tp::Workers(threads); });
}

void llama_tp_destroy_team(void* team) { delete &workers_of(team); }

// False if the model has more layers or a longer context than a team can count.
int32_t llama_tp_can_compute(const llama_tp::Model* model) { return llama_tp::fits_team(*model); }

// For a model that the library can compute. The team must outlive it. Null if there is not enough memory; steps
// allocate none.
void* llama_tp_create_model(const llama_tp::Model* model) {
    return or_null([=] { return new llama_tp::Context(*model); });
}

void llama_tp_destroy_model(void* context) { delete static_cast<llama_tp::Context*>(context); }

// y (tokens, rows) = x (tokens, columns) W^T + b. False if there is not enough memory, which a model of the team has
// allocated for its own layers and steps of few tokens.
int32_t llama_tp_multiply(void* team, const llama_tp::Linear* linear, const float* x, int32_t tokens, int32_t may_round,
                          float* y) {
    auto& workers = workers_of(team);
    const bool may_be_batch = may_round && llama_tp::kMultipliesBatches;
    const auto reserve = [&] {
        workers.reserve(tokens, linear->columns);
        if (may_be_batch) workers.reserve_batches(linear->columns);
    };
    if (!has(reserve)) return false;
    llama_tp::Product product(*linear, x, tokens, may_round, y, workers);
    workers.team.run(product, 0, 1);
    return true;
}

int32_t llama_tp_multiplies_batches(llama_tp::Form form) { return llama_tp::multiplies_batches(form); }

// Bytes that a product of many tokens needs to round them.
int64_t llama_tp_bytes_of_codes(const llama_tp::Linear* linear, int32_t tokens) {
    return llama_tp::Codes::num_bytes(*linear, tokens);
}

// The same for many tokens in bfloat16, for the layers of any model of the team. The number of columns is a multiple
// of 32. `codes`: bytes_of_codes of memory, aligned to 4 bytes.
int32_t llama_tp_multiply_batch(void* team, const llama_tp::Linear* linear, const uint16_t* x, int32_t tokens,
                                uint8_t* codes, uint16_t* y) {
    auto& workers = workers_of(team);
    if (!has([&] { workers.reserve_batches(linear->columns); })) return false;
    llama_tp::BatchProduct(*linear, x, tokens, codes, y, workers).run();
    return true;
}

// The following work on T tokens whose activations are bfloat16 or float32.

// x (T, dim) += y, if there is one; then to = RMSNorm(x).
void llama_tp_add_and_normalize(void* team, int32_t is_bfloat16, int32_t is_y_bfloat16, int32_t tokens, int32_t dim,
                                float* x, const void* y, const float* weight, float eps, int32_t zero_nonfinite,
                                void* to) {
    with_format(is_bfloat16, [=](auto format) {
        with_format(is_y_bfloat16, [=](auto y_format) {
            using C = decltype(format);
            using Y = decltype(y_format);
            llama_tp::for_each_token(workers_of(team).team, tokens, [=](int64_t token) {
                const auto* added = y == nullptr ? nullptr : (const typename Y::Number*)y + token * dim;
                llama_tp::add_and_normalize<Y, C>(x + token * dim, added, weight, dim, eps, zero_nonfinite,
                                                  (typename C::Number*)to + token * dim);
            });
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
        llama_tp::for_each_token(workers_of(team).team, tokens, [=](int64_t token) {
            const Number* gate = (const Number*)gate_up + token * 2 * hidden;
            llama_tp::gate<decltype(format)>(gate, gate + hidden, hidden, (Number*)to + token * hidden);
        });
    });
}

void llama_tp_widen(void* team, const llama_tp::Linear* linear, int64_t begin, int64_t end, uint16_t* to) {
    llama_tp::Widening widening(*linear, begin, end, to);
    workers_of(team).team.run(widening, 0, 1);
}

// Phases first .. end - 1 of 5 * layers + 2.
void llama_tp_run(void* context, const llama_tp::Step* step, int32_t first, int32_t end) {
    static_cast<llama_tp::Context*>(context)->run(*step, first, end);
}
}
