#include "thread_pool.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

#include "cpu_quota.h"
#include "errors.h"

namespace {

// Long enough to bridge the Python between two kernels of a decode step, short enough not to starve the server thread.
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kMaxThreads = 256;

// What num_threads() told this thread since its last call of run(); 0 for nothing.
thread_local int promised = 0;

template <class Condition>
void spin_until(Condition ready) {
  for (int i = 0; !ready(); ++i) {
    if (i < 2000) _mm_pause();
    else sched_yield();
  }
}

[[noreturn]] void refuse(const std::string& what) {
  throw KernelFault(what + ": expected a whole number of threads from 1 to " + std::to_string(kMaxThreads));
}

int default_threads() {
  if (const char* text = std::getenv("MOE_NUM_THREADS"); text && *text) {
    char* end;
    const long count = std::strtol(text, &end, 10);
    if (*end || count < 1 || count > kMaxThreads) refuse(std::string("MOE_NUM_THREADS=") + text);
    return (int)count;
  }
  cpu_set_t set;
  CPU_ZERO(&set);
  int count = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : (int)std::thread::hardware_concurrency();
  const double limit = cgroup_cpus("/proc/self/cgroup", "/sys/fs/cgroup");
  if (limit > 0) count = std::min(count, (int)(limit + 0.999));
  return std::clamp(count, 1, kMaxThreads);
}

class Pool {
 public:
  static Pool& instance() {
    // Never destroyed: a detached worker may outlive static destructors at exit.
    static Pool* pool = new Pool;
    return *pool;
  }

  int size() const { return limit_.load(std::memory_order_relaxed); }
  void resize(int count) {
    if (count < 0 || count > kMaxThreads) refuse("threads = " + std::to_string(count));
    limit_.store(count > 0 ? count : default_threads(), std::memory_order_relaxed);
  }

  void run(WorkerFunction function, void* context, int most) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    int limit = std::min(size(), most);
    if (limit > 1 && turn.owns_lock()) limit = std::min(limit, 1 + start_threads(limit - 1));
    if (limit == 1 || !turn.owns_lock()) {
      function(context, 0);
      return;
    }
    function_ = function;
    context_ = context;
    limit_of_job_ = limit;
    const uint64_t job = (state_.load(std::memory_order_relaxed) >> kJobShift) + 1;
    state_.store(job << kJobShift | kOpen, std::memory_order_seq_cst);
    if (parked_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(park_);
      wake_.notify_all();
    }
    function(context, 0);
    // Close the door, then wait for those inside. Who comes later finds it closed.
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    spin_until([this] { return (state_.load(std::memory_order_acquire) & kInside) == 0; });
  }

 private:
  // state_: job number | door open | how many workers are inside.
  static constexpr uint64_t kInside = 0x7fff, kOpen = 0x8000;
  static constexpr int kJobShift = 16;

  Pool() {
    resize(0);
    // Threads do not survive fork(); the child starts its own when it first needs them.
    pthread_atfork(nullptr, nullptr, [] { instance().reset_after_fork(); });
  }

  void reset_after_fork() {
    // The parent's threads, and any locks they held, do not exist here: begin as if new.
    new (&turn_) std::mutex;
    new (&park_) std::mutex;
    new (&wake_) std::condition_variable;
    state_.store(0);
    parked_.store(0);
    started_ = 0;
  }

  // How many there are, which is fewer than `count` where the system allows no more (a limit on processes).
  int start_threads(int count) {
    if (started_ >= count) return started_;
    // Signals belong to the threads of the program, but for those that an instruction of this one raises: blocked, they
    // would end the process without asking anybody's handler (faulthandler; the AMX emulator of the tests).
    sigset_t all, before;
    sigfillset(&all);
    for (int raised : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP}) sigdelset(&all, raised);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; started_ < count; ++started_) {
        const uint64_t seen = state_.load(std::memory_order_relaxed) >> kJobShift;
        std::thread([this, id = started_ + 1, seen] { serve(id, seen); }).detach();
      }
    } catch (const std::exception&) {  // no more threads, or no memory for one
      limit_.store(1 + started_, std::memory_order_relaxed);  // or every call would try again
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started_;
  }

  void serve(int id, uint64_t seen) {
    pthread_setname_np(pthread_self(), "moe-worker");
    for (;;) {
      const uint64_t state = wait_for_job_after(seen);
      seen = state >> kJobShift;
      if (!enter(seen)) continue;
      stay_on_node(id);
      if (id < limit_of_job_) function_(context_, id);
      state_.fetch_sub(1, std::memory_order_release);
    }
  }

  // True when this worker is inside the job `seen`, whose function and context cannot change until it leaves.
  bool enter(uint64_t seen) {
    uint64_t state = state_.load(std::memory_order_acquire);
    while ((state & kOpen) && state >> kJobShift == seen) {
      if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) return true;
    }
    return false;
  }

  uint64_t wait_for_job_after(uint64_t seen) {
    const auto fresh = [&](uint64_t state) { return (state & kOpen) && state >> kJobShift != seen; };
    const auto start = std::chrono::steady_clock::now();
    do {
      for (int i = 0; i < 64; ++i) {
        const uint64_t state = state_.load(std::memory_order_acquire);
        if (fresh(state)) return state;
        _mm_pause();
      }
    } while (std::chrono::steady_clock::now() - start < kSpin);
    std::unique_lock<std::mutex> lock(park_);
    parked_.fetch_add(1, std::memory_order_seq_cst);
    uint64_t state;
    wake_.wait(lock, [&] { return fresh(state = state_.load(std::memory_order_seq_cst)); });
    parked_.fetch_sub(1, std::memory_order_relaxed);
    return state;
  }

  std::mutex turn_;  // one job at a time
  std::atomic<int> limit_{1};
  alignas(64) std::atomic<uint64_t> state_{0};
  WorkerFunction function_ = nullptr;
  void* context_ = nullptr;
  int limit_of_job_ = 1;
  int started_ = 0;
  std::mutex park_;
  std::condition_variable wake_;
  std::atomic<int> parked_{0};
};

}  // namespace

void Stage::wait() const {
  spin_until([this] { return done_.load(std::memory_order_acquire) == total_; });
}

SlicedStage::SlicedStage(int64_t repeats, int64_t parts)
    : num_slices_((int)std::min<int64_t>(num_nodes(), std::max<int64_t>(parts, 1))), total_(repeats * parts) {
  for (int i = 0; i < num_slices_; ++i) {
    slices_[i].first = parts * i / num_slices_;
    slices_[i].parts = parts * (i + 1) / num_slices_ - slices_[i].first;
    slices_[i].total = repeats * slices_[i].parts;
  }
}
void SlicedStage::wait() const {
  spin_until([this] { return done_.load(std::memory_order_acquire) == total_; });
}

void set_num_threads(int count) { Pool::instance().resize(count); }
int num_threads() { return promised = Pool::instance().size(); }
void run_workers(WorkerFunction function, void* context) {
  const int most = promised > 0 ? promised : kMaxThreads;
  promised = 0;
  Pool::instance().run(function, context, most);
}
