// Which tasks of a SlicedStage a worker of each node takes, and in which order.
#include "check.h"
#include "thread_pool.h"

void check_slices() {
  set_nodes({{0}, {1}, {2}});
  constexpr int64_t kRepeats = 2, kParts = 7;  // slices [0, 2), [2, 4), [4, 7)
  constexpr int64_t kFirst[] = {0, 2, 4, 7};
  for (int node = 0; node < 3; ++node) {
    SlicedStage stage(kRepeats, kParts);
    std::vector<int64_t> wanted, got;
    for (int turn = 0; turn < 3; ++turn) {
      const int slice = (node + turn) % 3;
      for (int64_t r = 0; r < kRepeats; ++r) {
        for (int64_t p = kFirst[slice]; p < kFirst[slice + 1]; ++p) wanted.push_back(r * kParts + p);
      }
    }
    stage.drain_as(node, [&](int64_t repeat, int64_t part) { got.push_back(repeat * kParts + part); });
    stage.wait();
    if (got != wanted) fail("order of slices", node, 0);
  }
  // Side by side, each node's worker gets through its own slice before anybody else's.
  SlicedStage stage(1, 6);
  std::vector<int64_t> taken;
  stage.drain_as(2, [&](int64_t, int64_t part) {
    taken.push_back(part);
    if (taken.size() == 1) stage.drain_as(0, [&](int64_t, int64_t other) { taken.push_back(other); });
  });
  if (taken != std::vector<int64_t>{4, 0, 1, 2, 3, 5}) fail("slices side by side", 0, 1);
  for (const int64_t parts : {0, 1, 2}) {  // fewer parts than nodes
    SlicedStage small(3, parts);
    int64_t count = 0;
    small.drain_as(2, [&](int64_t, int64_t) { ++count; });
    small.wait();
    if (count != 3 * parts) fail("tasks of a small stage", (double)count, 3.0 * (double)parts);
  }
  set_nodes({});
}
