// The working memory of a step: taken front to back, given back by scopes, kept for the next step. A step that needs
// more than the last takes it in pieces, and the next reset makes one piece of them: a steady state allocates nothing.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "ops.h"

class Arena {
  struct Place {
    size_t piece = 0;
    int64_t used = 0;  // bytes of that piece
  };

 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  ~Arena() { release(); }

  // Space for `count` objects of T, at a cache line, not initialised; valid until the innermost scope ends.
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = round_up(count * (int64_t)sizeof(T), kLine);
    while (place_.piece < pieces_.size() && place_.used + bytes > pieces_[place_.piece].size) {
      place_ = {place_.piece + 1, 0};
    }
    if (place_.piece == pieces_.size()) add_piece(bytes);
    char* start = pieces_[place_.piece].data + place_.used;
    place_.used += bytes;
    return reinterpret_cast<T*>(start);
  }

  // Everything that was taken is free again.
  void reset() {
    place_ = {};
    if (pieces_.size() < 2) return;
    int64_t total = 0;
    for (const Piece& piece : pieces_) total += piece.size;
    release();
    add_piece(total);
  }

  // What is taken while a Scope lives is free after it.
  class Scope {
   public:
    explicit Scope(Arena& arena) : arena_(arena), place_(arena.place_) {}
    Scope(const Scope&) = delete;
    ~Scope() { arena_.place_ = place_; }

   private:
    Arena& arena_;
    const Place place_;
  };

 private:
  static constexpr int64_t kLine = 64, kHugePage = 2 << 20;

  struct Piece {
    char* data;
    int64_t size;
  };

  void add_piece(int64_t bytes) {
    const int64_t alignment = bytes >= 2 * kHugePage ? kHugePage : kLine;
    const int64_t size = round_up(bytes, alignment);
    pieces_.reserve(pieces_.size() + 1);
    char* data = static_cast<char*>(std::aligned_alloc((size_t)alignment, (size_t)size));
    if (!data) throw std::bad_alloc();
    if (alignment == kHugePage) advise_huge_pages(data, size);
    pieces_.push_back({data, size});
  }

  void release() {
    for (const Piece& piece : pieces_) std::free(piece.data);
    pieces_.clear();
  }

  std::vector<Piece> pieces_;
  Place place_;
};
