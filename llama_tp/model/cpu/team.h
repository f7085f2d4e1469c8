// A team of threads that computes a sequence of phases, each a number of independent chunks.
//
// Each thread has a range of a phase's chunks, which it computes in their order, as memory is read fastest; then it
// takes chunks from the ends of the others' ranges.
//
// A phase is over once all its chunks are, not once all threads have arrived: a thread that the kernel has descheduled
// between two chunks delays nobody, and the others compute what it would have. Nothing waits without bound: after some
// microseconds a thread yields its core, and after some more without a step it sleeps.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <new>
#include <thread>
#include <vector>

namespace llama_tp {

class Job {
  public:
    virtual ~Job() = default;
    virtual int num_chunks(int phase) const = 0;
    // `is_first`: of this phase in this thread. Chunks come in no particular order.
    virtual void compute(int phase, int chunk, int thread, bool is_first) = 0;
    // Bring into the cache what the calling thread needs first for the chunk that it will probably compute next.
    virtual void fetch_ahead(int phase, int chunk, bool is_first) const {}
};

class Team {
  public:
    static constexpr int kMaxPhases = 2048, kChunkBits = 21;
    static constexpr int64_t kMaxChunks = (1 << kChunkBits) - 1;  // of a phase

    explicit Team(int num_threads)
        : num_threads_(num_threads), ranges_(size_t(kMaxPhases) / kPerLine * num_threads), unfinished_(kMaxPhases) {
        try {
            for (int thread = 1; thread < num_threads; ++thread) {
                workers_.emplace_back([this, thread] { work(thread); });
            }
        } catch (...) {
            end();
            throw;
        }
    }

    ~Team() { end(); }

    int num_threads() const { return num_threads_; }

    // Compute phases first .. end - 1 in the calling thread and the team. Returns when they are done. The job observes
    // kMaxPhases and kMaxChunks.
    void run(Job& job, int first, int end) {
        const uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
        for (int phase = first; phase < end; ++phase) {
            const int64_t chunks = job.num_chunks(phase);
            for (int thread = 0; thread < num_threads_; ++thread) {
                const Range own{int(chunks * thread / num_threads_), int(chunks * (thread + 1) / num_threads_)};
                range_of(phase, thread).store(own.packed(epoch), std::memory_order_relaxed);
            }
            unfinished_[phase].value.store(uint64_t(epoch) << 32 | uint32_t(chunks), std::memory_order_relaxed);
        }
        job_.store(&job, std::memory_order_relaxed);
        phases_.store(uint64_t(first) << 32 | uint32_t(end), std::memory_order_relaxed);
        epoch_.store(epoch);  // sequentially consistent: notify_all() must see who waits
        if (!workers_.empty()) epoch_.notify_all();
        compute(job, epoch, first, end, 0);
    }

    // Calls allocate(thread) once in each thread. Throws std::bad_alloc, once all are done, if one of them does.
    template <class Allocate>
    void in_each_thread(Allocate allocate) {
        EachThread<Allocate> job(num_threads_, allocate);
        run(job, 0, 1);
        if (job.has_failed()) throw std::bad_alloc();
    }

  private:
    void end() {
        job_ = nullptr;
        epoch_.fetch_add(1);
        epoch_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    // A chunk for each thread, which does not end before every thread has one.
    template <class Allocate>
    class EachThread : public Job {
      public:
        EachThread(int num_threads, Allocate allocate) : num_threads_(num_threads), allocate_(allocate) {}

        int num_chunks(int) const override { return num_threads_; }

        void compute(int, int, int thread, bool) override {
            try {
                allocate_(thread);
            } catch (const std::exception&) {
                has_failed_ = true;
            }
            ++num_begun_;
            while (num_begun_ < num_threads_) sched_yield();
        }

        bool has_failed() const { return has_failed_; }

      private:
        const int num_threads_;
        const Allocate allocate_;
        std::atomic<int> num_begun_{0};
        std::atomic<bool> has_failed_{false};
    };

    struct alignas(64) Counter {
        std::atomic<uint64_t> value{0};
    };

    // A thread's ranges of successive phases share a line: run() writes all of them before each run.
    static constexpr int kPerLine = 8;
    struct alignas(64) Line {
        std::atomic<uint64_t> values[kPerLine]{};
    };

    // Chunks that nobody has claimed yet. Stored with the run's number: a late thread cannot claim a later run's.
    struct Range {
        int begin, end;

        explicit Range(uint64_t packed)
            : begin(int(packed >> kChunkBits & kMaxChunks)), end(int(packed & kMaxChunks)) {}
        Range(int begin, int end) : begin(begin), end(end) {}
        uint64_t packed(uint32_t epoch) const {
            return uint64_t(epoch) << 2 * kChunkBits | uint64_t(begin) << kChunkBits | uint64_t(end);
        }
        static bool is_of(uint64_t packed, uint32_t epoch) {
            return packed >> 2 * kChunkBits == (epoch & (1u << (64 - 2 * kChunkBits)) - 1);
        }
    };

    std::atomic<uint64_t>& range_of(int phase, int thread) {
        return ranges_[phase / kPerLine * num_threads_ + thread].values[phase % kPerLine];
    }

    static constexpr int kSpins = 200;   // some microseconds
    static constexpr int kYields = 100;  // before a thread without work sleeps

    void work(int thread) {
        uint32_t seen = 0;
        for (;;) {
            for (int tries = 0; epoch_.load(std::memory_order_acquire) == seen; ++tries) {
                if (tries < kSpins) {
                    _mm_pause();
                } else if (tries < kSpins + kYields) {
                    sched_yield();
                } else {
                    epoch_.wait(seen);
                }
            }
            seen = epoch_.load(std::memory_order_acquire);
            Job* job = job_.load(std::memory_order_relaxed);
            if (job == nullptr) return;
            const uint64_t phases = phases_.load(std::memory_order_relaxed);
            compute(*job, seen, int(phases >> 32), int(uint32_t(phases)), thread);
        }
    }

    void compute(Job& job, uint32_t epoch, int first, int end, int thread) {
        for (int phase = first; phase < end; ++phase) {
            // A chunk that could be claimed keeps the run from ending, so `job` is what it was when it began.
            for (bool is_first = true;; is_first = false) {
                const int chunk = claim(phase, epoch, thread);
                if (chunk == kOver) return;
                if (chunk == kNone) break;
                fetch_ahead(job, phase, end, thread);
                job.compute(phase, chunk, thread, is_first);
                unfinished_[phase].value.fetch_sub(1, std::memory_order_acq_rel);
            }
            if (!wait(phase, epoch)) return;
        }
    }

    static constexpr int kNone = -1;
    static constexpr int kOver = -2;

    int claim(int phase, uint32_t epoch, int thread) {
        for (int offset = 0; offset < num_threads_; ++offset) {
            const int owner = (thread + offset) % num_threads_;
            auto& unclaimed = range_of(phase, owner);
            uint64_t value = unclaimed.load(std::memory_order_acquire);
            for (;;) {
                if (!Range::is_of(value, epoch)) return kOver;
                Range range(value);
                if (range.begin == range.end) break;
                const int chunk = owner == thread ? range.begin++ : --range.end;
                if (unclaimed.compare_exchange_weak(value, range.packed(epoch), std::memory_order_acq_rel))
                    return chunk;
            }
        }
        return kNone;
    }

    // The first chunk that is left of the thread's range of this phase, or else of the next.
    void fetch_ahead(const Job& job, int phase, int end, int thread) {
        for (int next = phase; next < std::min(end, phase + 2); ++next) {
            const Range own(range_of(next, thread).load(std::memory_order_relaxed));
            if (own.begin < own.end) return job.fetch_ahead(next, own.begin, next > phase);
        }
    }

    // Until all chunks of the phase are done. False if this run is over.
    bool wait(int phase, uint32_t epoch) {
        for (int tries = 0;; ++tries) {
            const uint64_t value = unfinished_[phase].value.load(std::memory_order_acquire);
            if (uint32_t(value >> 32) != epoch) return false;
            if (uint32_t(value) == 0) return true;
            if (tries < kSpins) {
                _mm_pause();
            } else {
                sched_yield();
            }
        }
    }

    const int num_threads_;
    std::atomic<uint32_t> epoch_{0};
    std::atomic<uint64_t> phases_{0};
    std::atomic<Job*> job_{nullptr};
    std::vector<Line> ranges_;
    std::vector<Counter> unfinished_;
    std::vector<std::thread> workers_;
};

}  // namespace llama_tp
