// One linear layer, its rows divided among the threads of a team.
#pragma once

#include <memory>
#include <vector>

#include "integer_batch.h"
#include "team.h"

namespace llama_tp {

// Of a product. The last two are those of many tokens.
enum Method { kExact, kInBFloat16, kInIntegers, kBatchInBFloat16, kBatchInIntegers };

constexpr int kFewTokens = 16;  // up to which no product of many is faster

// The fastest method, if inputs may be rounded (measured).
inline Method fastest(const Linear& linear, int tokens) {
    if (linear.form == kFloat32) return kExact;
    const bool is_many = linear.form == kInt8 ? tokens > kFewTokens : tokens > 40 && linear.columns > 2048;
    if (is_many && linear.columns % kGroup == 0) {
        if (linear.form == kBFloat16 && kHasBatchProduct) return kBatchInBFloat16;
        if (linear.form != kBFloat16 && kHasIntegerBatch) return kBatchInIntegers;
    }
    if (linear.form == kBFloat16) return kHasBFloat16 && tokens >= 2 ? kInBFloat16 : kExact;
    if (!has_integer_product(linear.form)) return kHasBFloat16 && tokens >= 6 ? kInBFloat16 : kExact;
    const int few = linear.form == kInt8 ? kFewTokens : 8;
    return kHasBFloat16 && tokens > few ? kInBFloat16 : kInIntegers;
}

// Chunks of rows, several for each thread, so that none waits long for another.
constexpr int kChunksPerThread = 12, kMinRows = 8;

// The rows of a layer, divided into chunks: of many tokens, whole blocks for those products.
class RowChunks {
  public:
    RowChunks(int64_t rows, int tokens, bool may_round, int threads) : rows_(rows) {
        const int step = may_round && kMultipliesBatches && tokens > kFewTokens ? kBatchRows : kMinRows;
        const int chunks = threads * kChunksPerThread;
        size_ = std::max(step, round_up((rows + chunks - 1) / chunks, step));
    }

    int count() const { return int((rows_ + size_ - 1) / size_); }

    void rows_of(int chunk, int64_t& begin, int64_t& end) const {
        begin = int64_t(chunk) * size_;
        end = std::min(rows_, begin + size_);
    }

  private:
    int64_t rows_;
    int size_;
};

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
        method_ = may_round ? fastest(linear, tokens) : kExact;
        in_.tokens = tokens;
        in_.stride = round_up(linear.columns, method_ == kInIntegers ? kCodes : 2 * W);
        in_.sum_stride = round_up(linear.columns / kGroup, W);
        in_.values = (float*)inputs_.data();
        in_.halves = (uint16_t*)inputs_.data();
        in_.codes = inputs_.data();
        in_.scales = (float*)(inputs_.data() + int64_t(tokens) * in_.stride);
        in_.sums = sums_.data();
        for (int token = 0; token < tokens; ++token) fill(linear, token, read(token));
    }

    // Rows begin .. end - 1 of the product.
    void multiply(const Linear& linear, int64_t begin, int64_t end, const Output& out) {
        switch (method_) {
            case kExact: return multiply_exactly(linear, begin, end, in_, out);
            case kInBFloat16: return multiply_in_bfloat16(linear, begin, end, in_, widened_.data(), out);
            case kInIntegers: return multiply_codes(linear, begin, end, in_, out);
            case kBatchInBFloat16:
                return multiply_batch(linear, begin, end, in_.halves, in_.tokens, batch, FloatOutput{out});
            case kBatchInIntegers:
                return multiply_integer_batch(linear, begin, end, codes_of(linear), in_.tokens, batch,
                                              FloatOutput{out});
        }
    }

    BatchScratch batch;

  private:
    void fill(const Linear& linear, int token, const float* x) {
        switch (method_) {
            case kExact: return fill_values(in_, linear, token, x);
            case kInBFloat16: return fill_halves(in_, linear, token, x);
            case kInIntegers: return fill_codes(in_, linear, token, x);
            case kBatchInBFloat16: return round_to_bf16(in_.halves + token * linear.columns, x, linear.columns);
            case kBatchInIntegers: return round_inputs(codes_of(linear), token, x, linear.columns);
        }
    }

    Codes codes_of(const Linear& linear) { return {inputs_.data(), in_.tokens, linear.columns}; }

    Buffer<uint8_t> inputs_;  // values, halves, or codes and then their scales
    Buffer<float> sums_;
    Buffer<uint16_t> widened_;
    Input in_;
    Method method_ = kExact;
};

// A team, and the memory of each of its threads for products. A thread allocates its own, so that it lies near its
// core, and before a step: a failure in a step would end the process.
class Workers {
  public:
    explicit Workers(int num_threads) : team(num_threads), scratch_(num_threads) {
        team.in_each_thread([&](int thread) { scratch_[thread] = std::make_unique<LayerScratch>(); });
    }

    LayerScratch& operator[](int thread) { return *scratch_[thread]; }

    // For products of up to this many tokens and columns. Throws std::bad_alloc.
    void reserve(int tokens, int64_t columns) {
        if (tokens <= tokens_ && columns <= columns_) return;
        const int most_tokens = std::max(tokens, tokens_);
        const int64_t most_columns = std::max(columns, columns_);
        team.in_each_thread([&](int thread) { scratch_[thread]->resize(most_tokens, most_columns); });
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
    std::vector<std::unique_ptr<LayerScratch>> scratch_;
    int tokens_ = 0;
    int64_t columns_ = 0, batch_columns_ = 0;
};

class Product : public Job {
  public:
    // `workers` have the memory for it.
    Product(const Linear& linear, const float* x, int tokens, bool may_round, float* y, Workers& workers)
        : linear_(linear),
          x_(x),
          tokens_(tokens),
          may_round_(may_round),
          y_(y),
          workers_(workers),
          chunks_(linear.rows, tokens, may_round, workers.team.num_threads()) {}

    int num_chunks(int) const override { return chunks_.count(); }

    void compute(int, int chunk, int thread, bool is_first) override {
        LayerScratch& scratch = workers_[thread];
        if (is_first) {
            scratch.prepare(linear_, tokens_, may_round_, [&](int token) { return x_ + token * linear_.columns; });
        }
        int64_t begin, end;
        chunks_.rows_of(chunk, begin, end);
        scratch.multiply(linear_, begin, end, {y_, linear_.rows, false});
    }

  private:
    const Linear linear_;
    const float* const x_;
    const int tokens_;
    const bool may_round_;
    float* const y_;
    Workers& workers_;
    const RowChunks chunks_;
};

// y = x W^T + b for many tokens; x (tokens, columns), y (tokens, rows) in bfloat16. Quantized weights are multiplied as
// integers.
class BatchProduct : public Job {
  public:
    // `workers` have the memory for it but for the inputs as integers.
    BatchProduct(const Linear& linear, const uint16_t* x, int tokens, uint8_t* codes, uint16_t* y, Workers& workers)
        : linear_(linear), x_(x), tokens_(tokens), codes_(codes, tokens, linear.columns), y_(y), workers_(workers) {}

    void run() { workers_.team.run(*this, linear_.form == kBFloat16 ? kMultiply : kRound, kEnd); }

    int num_chunks(int phase) const override {
        return phase == kRound ? tokens_ : int((linear_.rows + kBatchRows - 1) / kBatchRows);
    }

    void fetch_ahead(int phase, int chunk, bool is_first) const override {
        if (phase == kRound || !is_first) return;  // a product has already fetched the rows that follow its own
        int64_t row, end;
        rows_of(chunk, row, end);
        const int64_t size = bytes_per_row(linear_);
        fetch((const char*)linear_.weight + row * size, (end - row) * size);
        fetch_scales(linear_, row, end - row);
    }

    void compute(int phase, int chunk, int thread, bool) override {
        if (phase == kRound) return round_inputs(codes_, chunk, x_ + chunk * linear_.columns, linear_.columns);
        int64_t row, end;
        rows_of(chunk, row, end);
        BatchScratch& scratch = workers_[thread].batch;
        const BFloat16Output out{y_, linear_.rows};
        if (linear_.form == kBFloat16) return multiply_batch(linear_, row, end, x_, tokens_, scratch, out);
        multiply_integer_batch(linear_, row, end, codes_, tokens_, scratch, out);
    }

  private:
    enum Phase { kRound, kMultiply, kEnd };

    void rows_of(int chunk, int64_t& begin, int64_t& end) const {
        begin = int64_t(chunk) * kBatchRows;
        end = std::min(linear_.rows, begin + kBatchRows);
    }

    const Linear linear_;
    const uint16_t* const x_;
    const int tokens_;
    const Codes codes_;
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
