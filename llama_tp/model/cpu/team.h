// A team of threads that computes a sequence of phases, each a number of independent chunks.
//
// A phase is over once all its chunks are, not once all threads have arrived: a thread that the kernel has descheduled
// between two chunks delays nobody, and the others compute what it would have. Nothing waits without bound: after some
// microseconds a thread yields its core, and after some more without a step it sleeps.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace llama_tp {

class Job {
  public:
    virtual ~Job() = default;
    virtual int num_chunks(int phase) const = 0;
    // `is_first`: of this phase in this thread. Chunks come in no particular order.
    virtual void compute(int phase, int chunk, int thread, bool is_first) = 0;
};

class Team {
  public:
    explicit Team(int num_threads) : num_threads_(num_threads), unclaimed_(kMaxPhases), unfinished_(kMaxPhases) {
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

    // Compute phases first .. end - 1 in the calling thread and the team. Returns when they are done.
    void run(Job& job, int first, int end) {
        const uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
        for (int phase = first; phase < end; ++phase) {
            const uint64_t all = uint64_t(epoch) << 32 | uint32_t(job.num_chunks(phase));
            unclaimed_[phase].value.store(all, std::memory_order_relaxed);
            unfinished_[phase].value.store(all, std::memory_order_relaxed);
        }
        job_.store(&job, std::memory_order_relaxed);
        range_.store(uint64_t(first) << 32 | uint32_t(end), std::memory_order_relaxed);
        epoch_.store(epoch);  // sequentially consistent: notify_all() must see who waits
        if (!workers_.empty()) epoch_.notify_all();
        compute(job, epoch, first, end, 0);
    }

  private:
    void end() {
        job_ = nullptr;
        epoch_.fetch_add(1);
        epoch_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    struct alignas(64) Counter {
        std::atomic<uint64_t> value{
            0};  // the run's number, then that of chunks: a late thread cannot claim a later run's
    };

    static constexpr int kMaxPhases = 8192;
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
            const uint64_t range = range_.load(std::memory_order_relaxed);
            compute(*job, seen, int(range >> 32), int(uint32_t(range)), thread);
        }
    }

    void compute(Job& job, uint32_t epoch, int first, int end, int thread) {
        for (int phase = first; phase < end; ++phase) {
            // A chunk that could be claimed keeps the run from ending, so `job` is what it was when it began.
            for (bool is_first = true;; is_first = false) {
                const int chunk = claim(phase, epoch);
                if (chunk == kOver) return;
                if (chunk == kNone) break;
                job.compute(phase, chunk, thread, is_first);
                unfinished_[phase].value.fetch_sub(1, std::memory_order_acq_rel);
            }
            if (!wait(phase, epoch)) return;
        }
    }

    static constexpr int kNone = -1;
    static constexpr int kOver = -2;

    int claim(int phase, uint32_t epoch) {
        auto& unclaimed = unclaimed_[phase].value;
        uint64_t value = unclaimed.load(std::memory_order_acquire);
        for (;;) {
            if (uint32_t(value >> 32) != epoch) return kOver;
            if (uint32_t(value) == 0) return kNone;
            if (unclaimed.compare_exchange_weak(value, value - 1, std::memory_order_acq_rel))
                return int(uint32_t(value)) - 1;
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
    std::atomic<uint64_t> range_{0};
    std::atomic<Job*> job_{nullptr};
    std::vector<Counter> unclaimed_, unfinished_;
    std::vector<std::thread> workers_;
};

}  // namespace llama_tp
