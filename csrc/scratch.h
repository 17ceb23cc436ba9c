// Working memory of one call, kept by its thread for the next call of the same thread.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

class Scratch {
 public:
  // Space for `count` objects of T, aligned to a cache line; valid until the Scratch dies.
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = (count * (int64_t)sizeof(T) + 63) / 64 * 64;
    Buffer& buffer = this_thread();
    if (used_ + bytes > buffer.size) {  // pointers handed out before stay valid: old memory is freed at the end
      if (buffer.data) retired_.push_back(buffer.data);
      buffer.size = bytes + 2 * buffer.size;
      buffer.data = static_cast<char*>(std::aligned_alloc(64, (size_t)(buffer.size + 63) / 64 * 64));
      if (!buffer.data) {
        buffer.size = 0;
        throw std::bad_alloc();
      }
      used_ = 0;
    }
    char* place = buffer.data + used_;
    used_ += bytes;
    return reinterpret_cast<T*>(place);
  }

  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    for (char* old : retired_) std::free(old);
    if (this_thread().size > kKeep) this_thread().release();
  }

 private:
  static constexpr int64_t kKeep = 256 << 20;
  struct Buffer {
    char* data = nullptr;
    int64_t size = 0;
    void release() {
      std::free(data);
      data = nullptr;
      size = 0;
    }
    ~Buffer() { release(); }
  };
  static Buffer& this_thread() {
    static thread_local Buffer buffer;
    return buffer;
  }
  int64_t used_ = 0;
  std::vector<char*> retired_;
};
