// Activation rows in the form the matmul kernels read: bf16 for VDPBF16PS, else float; an odd K gets one zero behind
// it, because groups of bf16 weights are pairs. Rounded once per call, not once per tile.
#pragma once
#include <algorithm>
#include <cstring>

#include "kernel_table.h"
#include "scratch.h"
#include "thread_pool.h"

class Activations {
 public:
  Activations(const KernelTable& table, const float* x, int64_t rows, int64_t k, int32_t dtype, Scratch& scratch)
      : table_(table), x_(x), rows_(rows), k_(k), type_(table.activation[dtype]),
        padded_(round_up(k, group_size(dtype))), in_place_(type_ == kFloat32 && padded_ == k),
        stage_(in_place_ ? 0 : (rows + kRows - 1) / kRows) {
    if (!in_place_) copy_ = scratch.take<char>(rows * stride());
  }

  // Every worker calls this before it reads rows.
  void prepare() {
    stage_.drain([&](int64_t task) {
      for (int64_t r = task * kRows; r < std::min(rows_, (task + 1) * kRows); ++r) {
        char* row = copy_ + r * stride();
        table_.convert(x_ + r * k_, row, k_, type_);
        if (padded_ > k_) std::memset(row + k_ * element_size(type_), 0, (size_t)element_size(type_));
      }
    });
    stage_.wait();
  }

  const char* row(int64_t r) const { return (in_place_ ? reinterpret_cast<const char*>(x_) : copy_) + r * stride(); }
  int64_t stride() const { return padded_ * element_size(type_); }

 private:
  static constexpr int64_t kRows = 8;
  const KernelTable& table_;
  const float* x_;
  int64_t rows_, k_;
  int32_t type_;
  int64_t padded_;
  bool in_place_;
  char* copy_ = nullptr;
  Stage stage_;
};
