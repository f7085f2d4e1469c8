// One linear layer, its rows divided among the threads of a team.
#pragma once

#include <memory>
#include <vector>

#include "batch.h"
#include "integers.h"
#include "team.h"

namespace llama_tp {

// Chunks of rows, several for each thread, so that none waits long for another.
constexpr int kChunksPerThread = 12, kMinRows = 8;

inline int rows_per_chunk(int64_t rows, int threads) {
    const int chunks = threads * kChunksPerThread;
    return std::max(kMinRows, round_up((rows + chunks - 1) / chunks, kMinRows));
}

inline int num_chunks_of(int64_t rows, int threads) {
    const int size = rows_per_chunk(rows, threads);
    return int((rows + size - 1) / size);
}

inline void rows_of_chunk(int64_t rows, int threads, int chunk, int64_t& begin, int64_t& end) {
    begin = int64_t(chunk) * rows_per_chunk(rows, threads);
    end = std::min(rows, begin + rows_per_chunk(rows, threads));
}

enum Rounding { kNone, kToBFloat16, kToIntegers };  // of inputs

// The fastest product, if inputs may be rounded (measured).
inline Rounding fastest(const Linear& linear, int tokens) {
    if (linear.form == kFloat32) return kNone;
    if (linear.form == kBFloat16) return kHasBFloat16 && tokens >= 2 ? kToBFloat16 : kNone;
    if (!has_integer_product(linear.form)) return kHasBFloat16 && tokens >= 6 ? kToBFloat16 : kNone;
    const int limit = linear.form == kInt8 ? 16 : 8;
    return kHasBFloat16 && tokens > limit ? kToBFloat16 : kToIntegers;
}

// One thread's memory for a layer's inputs, and for the weights that it widens.
class LayerScratch {
  public:
    // For layers of up to this many columns.
    void resize(int tokens, int64_t columns) {
        const int64_t stride = round_up(columns, kCodes);
        inputs_.resize(tokens * stride * sizeof(float));
        sums_.resize(tokens * int64_t(round_up(stride / kGroup, W)));
        widened_.resize(kHalfRows * stride);
    }

    // Lay out the inputs: read(token) returns a row of them.
    template <class Read>
    void prepare(const Linear& linear, int tokens, bool may_round, Read read) {
        rounding_ = may_round ? fastest(linear, tokens) : kNone;
        in_.tokens = tokens;
        in_.stride = round_up(linear.columns, rounding_ == kToIntegers ? kCodes : 2 * W);
        in_.sum_stride = round_up(linear.columns / kGroup, W);
        in_.values = (float*)inputs_.data();
        in_.halves = (uint16_t*)inputs_.data();
        in_.codes = inputs_.data();
        in_.scales = (float*)(inputs_.data() + int64_t(tokens) * in_.stride);
        in_.sums = sums_.data();
        const auto fill = rounding_ == kNone ? fill_values : rounding_ == kToBFloat16 ? fill_halves : fill_codes;
        for (int token = 0; token < tokens; ++token) fill(in_, linear, token, read(token));
    }

    // Rows begin .. end - 1 of the product.
    void multiply(const Linear& linear, int64_t begin, int64_t end, const Output& out) {
        switch (rounding_) {
            case kNone: return multiply_exactly(linear, begin, end, in_, out);
            case kToBFloat16: return multiply_in_bfloat16(linear, begin, end, in_, widened_.data(), out);
            case kToIntegers: return multiply_codes(linear, begin, end, in_, out);
        }
    }

  private:
    Buffer<uint8_t> inputs_;  // values, halves, or codes and then their scales
    Buffer<float> sums_;
    Buffer<uint16_t> widened_;
    Input in_;
    Rounding rounding_ = kNone;
};

// A team, and the memory of each of its threads for products. A thread allocates its own, so that it lies near its core,
// and before a step: a failure in a step would end the process.
class Workers {
  public:
    struct Scratch {
        LayerScratch layer;
        BatchScratch batch;
    };

    explicit Workers(int num_threads) : team(num_threads), scratch_(num_threads) {
        team.in_each_thread([&](int thread) { scratch_[thread] = std::make_unique<Scratch>(); });
    }

    Scratch& operator[](int thread) { return *scratch_[thread]; }

    // For products of up to this many tokens and columns. Throws std::bad_alloc.
    void reserve(int tokens, int64_t columns) {
        if (tokens <= tokens_ && columns <= columns_) return;
        const int most_tokens = std::max(tokens, tokens_);
        const int64_t most_columns = std::max(columns, columns_);
        team.in_each_thread([&](int thread) { scratch_[thread]->layer.resize(most_tokens, most_columns); });
        tokens_ = most_tokens, columns_ = most_columns;
    }

    // For products of many tokens.
    void reserve_batches(int64_t columns) {
        if (columns <= batch_columns_) return;
        team.in_each_thread([&](int thread) { scratch_[thread]->batch.resize(columns); });
        batch_columns_ = columns;
    }

    Team team;

  private:
    std::vector<std::unique_ptr<Scratch>> scratch_;
    int tokens_ = 0;
    int64_t columns_ = 0, batch_columns_ = 0;
};

class Product : public Job {
  public:
    // `workers` have the memory for it.
    Product(const Linear& linear, const float* x, int tokens, bool may_round, float* y, Workers& workers)
        : linear_(linear), x_(x), tokens_(tokens), may_round_(may_round), y_(y), workers_(workers) {}

    int num_chunks(int) const override { return num_chunks_of(linear_.rows, workers_.team.num_threads()); }

    void compute(int, int chunk, int thread, bool is_first) override {
        LayerScratch& scratch = workers_[thread].layer;
        if (is_first) {
            scratch.prepare(linear_, tokens_, may_round_, [&](int token) { return x_ + token * linear_.columns; });
        }
        int64_t begin, end;
        rows_of_chunk(linear_.rows, workers_.team.num_threads(), chunk, begin, end);
        scratch.multiply(linear_, begin, end, {y_, linear_.rows, false});
    }

  private:
    const Linear linear_;
    const float* const x_;
    const int tokens_;
    const bool may_round_;
    float* const y_;
    Workers& workers_;
};

// y = x W^T + b for many tokens; x (tokens, columns), y (tokens, rows) in bfloat16.
class BatchProduct : public Job {
  public:
    // `workers` have the memory for it.
    BatchProduct(const Linear& linear, const uint16_t* x, int tokens, uint16_t* y, Workers& workers)
        : linear_(linear), x_(x), tokens_(tokens), y_(y), workers_(workers) {}

    int num_chunks(int) const override { return int((linear_.rows + kBatchRows - 1) / kBatchRows); }

    void fetch_ahead(int, int chunk, bool) const override {
        int64_t row, end;
        rows_of(chunk, row, end);
        const int64_t size = bytes_per_row(linear_);
        fetch((const char*)linear_.weight + row * size, (end - row) * size);
        fetch_scales(linear_, row, end - row);
    }

    void compute(int, int chunk, int thread, bool) override {
        int64_t row, end;
        rows_of(chunk, row, end);
        multiply_batch(linear_, row, end, x_, tokens_, workers_[thread].batch, y_);
    }

  private:
    void rows_of(int chunk, int64_t& begin, int64_t& end) const {
        begin = int64_t(chunk) * kBatchRows;
        end = std::min(linear_.rows, begin + kBatchRows);
    }

    const Linear linear_;
    const uint16_t* const x_;
    const int tokens_;
    uint16_t* const y_;
    Workers& workers_;
};

// Rows of a quantized matrix in bfloat16.
class Widening : public Job {
  public:
    Widening(const Linear& linear, int64_t begin, int64_t end, uint16_t* to)
        : linear_(linear), begin_(begin), end_(end), to_(to) {}

    int num_chunks(int) const override { return int((end_ - begin_ + kRows - 1) / kRows); }

    void compute(int, int chunk, int, bool) override {
        const int64_t first = begin_ + int64_t(chunk) * kRows;
        for (int64_t row = first; row < std::min(end_, first + kRows); ++row) {
            widen_row<false>(linear_, row, to_ + (row - begin_) * linear_.columns);
        }
    }

  private:
    static constexpr int kRows = 4;
    const Linear linear_;
    const int64_t begin_, end_;
    uint16_t* const to_;
};

}  // namespace llama_tp
