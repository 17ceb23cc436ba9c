// A loop over independent rows, on several threads where that pays.
#pragma once
#include <algorithm>
#include <cstdint>

#include "thread_pool.h"

constexpr int64_t kParallelRows = 1 << 16;  // floats from which threads pay

// Calls body(begin, end) until every row of `row_size` floats has been in one such range.
template <class F>
void for_row_chunks(int64_t rows, int64_t row_size, F body) {
  const int64_t chunk = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, row_size));
  Stage stage((rows + chunk - 1) / chunk);
  run(rows * row_size >= kParallelRows, [&](int) {
    stage.drain([&](int64_t task) { body(task * chunk, std::min(rows, (task + 1) * chunk)); });
    stage.wait();
  });
}
