// Activation rows in the form the matmul kernels read (layout.h): converted once per call, not once per tile.
#pragma once
#include <algorithm>

#include "kernel_table.h"
#include "scratch.h"
#include "thread_pool.h"

class Activations {
 public:
  Activations(const KernelTable& table, const float* x, int64_t rows, int64_t k, int32_t format, Scratch& scratch)
      : table_(table), x_(x), rows_(rows), k_(k), type_(table.input_rows[format_kind(format)]),
        in_place_(type_ == kRowFloat32 && row_bytes(k, type_) == k * (int64_t)sizeof(float)),
        stage_(in_place_ ? 0 : (rows + kRows - 1) / kRows) {
    if (!in_place_) copy_ = scratch.take<char>(rows * stride());
  }

  // Every worker calls this before it reads rows.
  void prepare() {
    stage_.drain([&](int64_t task) {
      for (int64_t r = task * kRows; r < std::min(rows_, (task + 1) * kRows); ++r) {
        table_.write_row(x_ + r * k_, copy_ + r * stride(), 0, k_, k_, type_);
      }
    });
    stage_.wait();
  }

  const char* row(int64_t r) const { return (in_place_ ? reinterpret_cast<const char*>(x_) : copy_) + r * stride(); }
  int64_t stride() const { return row_bytes(k_, type_); }
  int32_t type() const { return type_; }

 private:
  static constexpr int64_t kRows = 8;
  const KernelTable& table_;
  const float* x_;
  int64_t rows_, k_;
  int32_t type_;
  bool in_place_;
  char* copy_ = nullptr;
  Stage stage_;
};
