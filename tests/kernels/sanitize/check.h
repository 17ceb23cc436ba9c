// What the checks share: seeded numbers, memory whose ends are watched, weights of every format, comparisons.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "ops.h"

[[noreturn]] inline void fail(const char* what, double got, double wanted) {
  std::fprintf(stderr, "%s: %.9g, expected %.9g\n", what, got, wanted);
  std::abort();
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
  uint64_t below(uint64_t limit) { return (next() >> 33) % limit; }
  float normal() {  // nearly: the sum of four uniforms, variance 1
    float sum = -2;
    for (int i = 0; i < 4; ++i) sum += (float)(next() >> 40) / (1 << 24);
    return sum * 1.7320508f;
  }

 private:
  uint64_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return state_;
  }
  uint64_t state_;
};

// Exactly `count` objects that end where a page begins that nobody may touch. It catches what the compiler's checks
// do not see (masked loads, inline assembly); where they do see, half of all buffers come from their heap.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count, bool guarded = true) : count_(count) {
    const size_t bytes = (size_t)count * sizeof(T), page = (size_t)sysconf(_SC_PAGESIZE);
    if (!guarded) {
      memory_ = std::aligned_alloc(64, (bytes + 127) / 64 * 64);
      data_ = (T*)memory_;
      return;
    }
    mapped_ = (bytes + page - 1) / page * page + page;
    memory_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) fail("mmap", 0, (double)mapped_);
    char* end = (char*)memory_ + mapped_ - page;
    mprotect(end, page, PROT_NONE);
    data_ = (T*)(end - bytes);
  }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(mapped_, other.mapped_);
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~Buffer() {
    if (mapped_) munmap(memory_, mapped_);
    else std::free(memory_);
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return count_; }

 private:
  void* memory_ = nullptr;
  size_t mapped_ = 0;
  T* data_ = nullptr;
  int64_t count_ = 0;
};

inline Buffer<float> normals(Random& random, int64_t count) {
  Buffer<float> values(count, random.below(2));
  for (int64_t i = 0; i < count; ++i) values[i] = random.normal();
  return values;
}

// Everything that kernels wrote, in order, so that two runs can be compared bit by bit.
class Outputs {
 public:
  explicit Outputs(bool compute_naively) : naive(compute_naively) {}
  const bool naive;  // compare with loops as well: slow, so one run does it

  template <class T>
  void keep(const Buffer<T>& values) {
    const char* bytes = (const char*)values.data();
    bytes_.insert(bytes_.end(), bytes, bytes + values.size() * (int64_t)sizeof(T));
  }
  int64_t size() const { return (int64_t)bytes_.size(); }
  bool operator==(const Outputs& other) const { return bytes_ == other.bytes_; }

 private:
  std::vector<char> bytes_;
};

// A matrix [n, k] as numbers, and in the form that is packed.
struct Weight {
  int64_t n, k;
  int32_t format;
  std::vector<double> values;
  double at(int64_t row, int64_t column) const { return values[(size_t)(row * k + column)]; }

  Weight(Random& random, int64_t rows, int64_t columns, int32_t weight_format);
  void pack_into(char* packed, PackTarget target) const;

 private:
  std::vector<char> plain_;
  std::vector<uint8_t> codes_, zeros_;
  std::vector<float> scales_;
};
constexpr int32_t kFormats[] = {kFloat32,
                                kBFloat16,
                                kFloat16,
                                kInt8,
                                kInt4 | 32 << 8,
                                kInt4 | 128 << 8,
                                kInt4 | 32 << 8 | 1 << 24,
                                kInt4 | 64 << 8 | 1 << 24};

// How far a product may be off, as a share of max|x| * sum|w|: the rounding of activations, then that of sums.
inline double tolerance(int32_t format, int64_t k) {
  const double activations = is_integer(format) ? 1.0 / 200 : format_kind(format) == kBFloat16 ? 1.0 / 200 : 0;
  return activations + 4 * std::sqrt((double)k + 1) / (1 << 24);
}

uint16_t to_bfloat16(float value);
float from_bfloat16(uint16_t bits);

// The checks: each runs a grid of edge cases and keeps what came out.
void check_packing(Outputs& outputs);
void check_linear(Outputs& outputs);
void check_moe(Outputs& outputs);
void check_attention(Outputs& outputs);
void check_rows(Outputs& outputs);
void check_router(Outputs& outputs);
void check_step(Outputs& outputs);
void check_sampling(Outputs& outputs);
void check_checksums(Outputs& outputs);
void check_refusals();
void check_slices();
