#include "thread_pool.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {

// Long enough to bridge the Python between two kernels of a decode step, short enough not to starve the server thread.
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kMaxThreads = 256;

template <class Condition>
void spin_until(Condition ready) {
  for (int i = 0; !ready(); ++i) {
    if (i < 2000) _mm_pause();
    else sched_yield();
  }
}

// CPUs' worth of time the cgroup allows, or 0 for no limit. v2: "max 100000" or "150000 100000"; v1: two files.
double quota_in(const std::string& folder) {
  std::string quota;
  double period = 0;
  if (std::ifstream v2(folder + "/cpu.max"); v2 >> quota >> period && quota != "max" && period > 0) {
    return std::atof(quota.c_str()) / period;
  }
  double microseconds = 0;
  std::ifstream v1_quota(folder + "/cpu.cfs_quota_us"), v1_period(folder + "/cpu.cfs_period_us");
  if (v1_quota >> microseconds && v1_period >> period && microseconds > 0 && period > 0) return microseconds / period;
  return 0;
}

// The tightest limit on the way from this process's group to the root of each hierarchy that governs cpu time.
double cgroup_limit() {
  double limit = 0;
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    std::istringstream fields(line);
    std::string id, controllers, path;
    std::getline(fields, id, ':');
    std::getline(fields, controllers, ':');
    std::getline(fields, path);
    std::string mount;
    if (controllers.empty()) mount = "/sys/fs/cgroup";
    else if (("," + controllers + ",").find(",cpu,") != std::string::npos) mount = "/sys/fs/cgroup/cpu";
    else continue;
    for (;;) {
      const double here = quota_in(mount + path);
      if (here > 0) limit = limit > 0 ? std::min(limit, here) : here;
      if (path.empty()) break;
      path.resize(path.find_last_of('/') == std::string::npos ? 0 : path.find_last_of('/'));
    }
  }
  return limit;
}

int default_threads() {
  if (const char* text = std::getenv("MOE_NUM_THREADS"); text && std::atoi(text) > 0) {
    return std::min(std::atoi(text), kMaxThreads);
  }
  cpu_set_t set;
  CPU_ZERO(&set);
  int count = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : (int)std::thread::hardware_concurrency();
  if (const double limit = cgroup_limit(); limit > 0) count = std::min(count, (int)(limit + 0.999));
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
    limit_.store(count > 0 ? std::min(count, kMaxThreads) : default_threads(), std::memory_order_relaxed);
  }

  void run(void (*function)(void*, int), void* context) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    const int limit = size();
    if (limit == 1 || !turn.owns_lock()) {
      function(context, 0);
      return;
    }
    start_threads(limit - 1);
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

  void start_threads(int count) {
    for (; started_ < count; ++started_) {
      const uint64_t seen = state_.load(std::memory_order_relaxed) >> kJobShift;
      std::thread([this, id = started_ + 1, seen] { serve(id, seen); }).detach();
    }
  }

  void serve(int id, uint64_t seen) {
    for (;;) {
      const uint64_t state = wait_for_job_after(seen);
      seen = state >> kJobShift;
      if (!enter(seen)) continue;
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
  void (*function_)(void*, int) = nullptr;
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

void set_num_threads(int count) { Pool::instance().resize(count); }
int num_threads() { return Pool::instance().size(); }
void run_workers(void (*function)(void*, int), void* context) { Pool::instance().run(function, context); }
