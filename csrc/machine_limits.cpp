#include "machine_limits.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "cpu_features.h"
#include "errors.h"
#include "thread_pool.h"

namespace {

typedef std::chrono::steady_clock Clock;
constexpr int64_t kReadTask = 2 << 20;     // a huge page; small enough that no thread waits for the last one
constexpr int64_t kRoundsPerLook = 10000;  // some ten microseconds between two looks at the clock

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

const Peak& peak_of(int32_t kind) {
  if (kind < 0 || kind >= kNumKinds) {
    throw KernelFault("matrix_peak: kind = " + std::to_string(kind) + ", expected 0 <= kind < " + std::to_string(kNumKinds));
  }
  return kernels().peak[kind];
}

}  // namespace

double read_bandwidth(const char* data, int64_t bytes, int64_t passes) {
  const KernelTable& table = kernels();
  const int64_t share = std::max<int64_t>(bytes / num_threads() / 256 * 256, 256);
  const int64_t size = std::min(kReadTask, share), tasks = (bytes + size - 1) / size;
  Stage stage(tasks * passes);
  const Clock::time_point start = Clock::now();
  run(true, [&](int) {
    stage.drain([&](int64_t task) {
      const int64_t first = task % tasks * size;
      table.read_memory(data + first, std::min(size, bytes - first));
    });
    stage.wait();
  });
  return (double)bytes * (double)passes / seconds_since(start);
}

double matrix_peak(int32_t kind, double seconds) {
  const Peak& peak = peak_of(kind);
  std::atomic<int64_t> looks{0};
  const Clock::time_point start = Clock::now();
  run(true, [&](int) {
    int64_t mine = 0;
    do {
      peak.run(kRoundsPerLook);
      ++mine;
    } while (seconds_since(start) < seconds);
    looks.fetch_add(mine);
  });
  return (double)(looks.load() * kRoundsPerLook * peak.operations) / seconds_since(start);
}

std::string matrix_peak_name(int32_t kind) { return peak_of(kind).name; }
