// What stands between the matrix products of a step of many tokens, each in one pass over its memory.
#pragma once

#include "attention.h"
#include "team.h"

namespace llama_tp {

// Calls row(token) for each token, some at a time.
template <class Row>
class ForEachToken : public Job {
  public:
    ForEachToken(int tokens, Row row) : tokens_(tokens), row_(row) {}

    int num_chunks(int) const override { return (tokens_ + kTokens - 1) / kTokens; }

    void compute(int, int chunk, int, bool) override {
        const int end = std::min(tokens_, (chunk + 1) * kTokens);
        for (int token = chunk * kTokens; token < end; ++token) row_(token);
    }

  private:
    static constexpr int kTokens = 8;
    const int tokens_;
    const Row row_;
};

template <class Row>
void for_each_token(Team& team, int tokens, Row row) {
    ForEachToken<Row> job(tokens, row);
    team.run(job, 0, 1);
}

// Activations have the cache's two formats.
template <class C>
inline void load_block(const typename C::Number* from, int count, vf& a, vf& b) {
    vf first, second;
    C::block(from, count, first, second);
    C::as_stored(first, second, a, b);
}

inline void store_block(float* to, int count, vf a, vf b) {
    if (count == 2 * W) {
        store(to, a);
        store(to + W, b);
        return;
    }
    float both[2 * W];
    store(both, a);
    store(both + W, b);
    std::memcpy(to, both, count * sizeof(float));
}

inline void store_block(uint16_t* to, int count, vf a, vf b) {
    if (count == 2 * W) return store_bf16(to, a, b);
    uint16_t both[2 * W];
    store_bf16(both, a, b);
    std::memcpy(to, both, count * sizeof(uint16_t));
}

// x += y, if there is a y; then to = x / sqrt(mean(x^2) + eps) * weight.
template <class Y, class C>
void add_and_normalize(float* x, const typename Y::Number* y, const float* weight, int dim, float eps,
                       bool zero_nonfinite, typename C::Number* to) {
    vf squares{}, more{}, a, b;
    for (int k = 0; k < dim; k += 2 * W) {
        const int count = std::min(2 * W, dim - k);
        load_stored(x + k, count, a, b);
        if (y != nullptr) {
            vf ya, yb;
            load_block<Y>(y + k, count, ya, yb);
            a += ya;
            b += yb;
            store_block(x + k, count, a, b);
        }
        squares = fma(a, a, squares);
        more = fma(b, b, more);
    }
    const vf scale = splat(1.0f / std::sqrt(sum(squares + more) / dim + eps));
    for (int k = 0; k < dim; k += 2 * W) {
        const int count = std::min(2 * W, dim - k);
        vf wa, wb;
        load_stored(x + k, count, a, b);
        load_stored(weight + k, count, wa, wb);
        a = a * scale * wa;
        b = b * scale * wb;
        if (zero_nonfinite) {
            a = finite_or_zero(a);
            b = finite_or_zero(b);
        }
        store_block(to + k, count, a, b);
    }
}

// Normalize, if there are weights, and rotate one head in place.
template <class C>
void rotate_head(typename C::Number* head, const float* norm, const float* rope, int dim, float eps) {
    vf scale = splat(1.0f);
    if (norm != nullptr) {
        vf squares{}, a, b;
        for (int k = 0; k < dim; k += 2 * W) {
            load_block<C>(head + k, std::min(2 * W, dim - k), a, b);
            squares = fma(a, a, fma(b, b, squares));
        }
        scale = splat(1.0f / std::sqrt(sum(squares) / dim + eps));
    }
    for (int k = 0; k < dim; k += 2 * W) {
        const int count = std::min(2 * W, dim - k);
        vf a, b, even, odd, cosine, sine;
        load_block<C>(head + k, count, a, b);
        if (norm != nullptr) {
            vf na, nb;
            load_stored(norm + k, count, na, nb);
            a = a * scale * na;
            b = b * scale * nb;
        }
        split(a, b, even, odd);
        load_stored(rope + k, count, a, b);
        split(a, b, cosine, sine);
        interleave(even * cosine - odd * sine, even * sine + odd * cosine, a, b);
        store_block(head + k, count, a, b);
    }
}

// SwiGLU: to = silu(gate) * up.
template <class C>
void gate(const typename C::Number* gate, const typename C::Number* up, int hidden, typename C::Number* to) {
    for (int k = 0; k < hidden; k += 2 * W) {
        const int count = std::min(2 * W, hidden - k);
        vf ga, gb, ua, ub;
        load_block<C>(gate + k, count, ga, gb);
        load_block<C>(up + k, count, ua, ub);
        store_block(to + k, count, ga / (1.0f + exponential(-ga)) * ua, gb / (1.0f + exponential(-gb)) * ub);
    }
}

}  // namespace llama_tp
