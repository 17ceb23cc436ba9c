// Our own threads: the caller is worker 0, late workers never delay a call, and results never depend on who did what.
#pragma once
#include <atomic>
#include <cstdint>

#include "topology.h"

// A list of independent tasks that any worker may take, and the point where all of them are known to be done.
class Stage {
 public:
  explicit Stage(int64_t total) : total_(total) {}
  Stage(const Stage&) = delete;

  template <class F>
  void drain(F&& task) {
    for (;;) {
      const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= total_) return;
      task(i);
      done_.fetch_add(1, std::memory_order_release);
    }
  }
  // Waits for tasks that other workers took. A worker that has not woken up yet holds none, so nobody waits for it.
  void wait() const;

 private:
  const int64_t total_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

// A Stage of repeats x parts tasks over a packed matrix that is sliced by memory node (topology.h): workers of the node
// that holds a part take it; who has no more of its own helps the others. On one node, a Stage in order of repeats.
class SlicedStage {
 public:
  SlicedStage(int64_t repeats, int64_t parts);
  SlicedStage(const SlicedStage&) = delete;

  // task(repeat, part)
  template <class F>
  void drain(F&& task) {
    drain_as(this_node(), task);
  }
  template <class F>
  void drain_as(int node, F&& task) {
    for (int turn = 0; turn < num_slices_; ++turn) {
      Slice& slice = slices_[(node + turn) % num_slices_];
      for (;;) {
        const int64_t i = slice.next.fetch_add(1, std::memory_order_relaxed);
        if (i >= slice.total) break;
        task(i / slice.parts, slice.first + i % slice.parts);
        done_.fetch_add(1, std::memory_order_release);
      }
    }
  }
  void wait() const;

 private:
  struct alignas(64) Slice {
    std::atomic<int64_t> next{0};
    int64_t total, first, parts;
  };
  Slice slices_[kMaxNodes];
  const int num_slices_;
  const int64_t total_;
  alignas(64) std::atomic<int64_t> done_{0};
};

// Threads that a call of run() may use, itself included. 0 restores the default: MOE_NUM_THREADS, else what the
// affinity mask and the cgroup quota allow. Throws KernelFault for a number, or a MOE_NUM_THREADS, that is none.
void set_num_threads(int count);
// Whoever sizes memory per worker asks here first: the same thread's next run() uses no more workers than this, even
// if another thread raises the count in between.
int num_threads();

// Calls function(context, worker) on the caller (worker 0) and on idle pool threads, and returns when all have left.
// function must take its work from Stages. If the pool is busy with another Python thread's call, the caller does
// everything itself: slower, same bits. A child after fork() has a pool of its own. Nothing may be thrown where others
// wait for the task: inputs are checked before, and what is thrown all the same ends the process.
typedef void (*WorkerFunction)(void* context, int worker) noexcept;
void run_workers(WorkerFunction function, void* context);

template <class F>
void run(bool parallel, F&& body) {
  if (!parallel) {
    body(0);
    return;
  }
  run_workers([](void* context, int worker) noexcept { (*static_cast<F*>(context))(worker); }, &body);
}
