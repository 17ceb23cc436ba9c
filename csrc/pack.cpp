// Writes and reads plain weights in the layout of layout.h, bit by bit: they are moved, never converted.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "pack_tiles.h"

namespace {

// visit(source index, or -1 for padding; packed index) for every element of one tile.
template <class F>
void visit_tile(int64_t tile, int64_t n, int64_t k, int64_t group, PackTarget target, F visit) {
  const Place place = place_of(tile, target);
  const int64_t padded = padded_k(k, kFloat32);
  const int64_t base = place.panel * padded * kPanelColumns + place.slot * kTileColumns * group;
  for (int64_t g = 0; g < padded / group; ++g) {
    for (int64_t c = 0; c < kTileColumns; ++c) {
      for (int64_t j = 0; j < group; ++j) {
        const int64_t column = tile * kTileColumns + c, row = g * group + j;
        visit(column < n && row < k ? column * k + row : -1, base + (g * kPanelColumns + c) * group + j);
      }
    }
  }
}

// A full tile, a group at a time (Group is 4 bytes for pairs of bf16): 16 x 16 blocks keep both sides in L1.
template <class Group>
void pack_full_tile(const char* weight, int64_t groups, int64_t padded_groups, char* packed) {
  constexpr int64_t kSize = sizeof(Group), kBlock = 16;
  for (int64_t first = 0; first < groups; first += kBlock) {
    const int64_t end = std::min(groups, first + kBlock);
    for (int64_t c = 0; c < kTileColumns; ++c) {
      for (int64_t g = first; g < end; ++g) {
        std::memcpy(packed + (g * kPanelColumns + c) * kSize, weight + (c * groups + g) * kSize, kSize);
      }
    }
  }
  for (int64_t g = groups; g < padded_groups; ++g) {
    std::memset(packed + g * kPanelColumns * kSize, 0, kTileColumns * kSize);
  }
}

template <class T, class Group>
void pack_as(const T* weight, int64_t n, int64_t k, PackTarget target, T* packed) {
  constexpr int64_t group = sizeof(Group) / sizeof(T);
  const int64_t padded = padded_k(k, kFloat32);
  for_each_tile(n, k, target, [&](int64_t tile) {
    if ((tile + 1) * kTileColumns <= n && k % group == 0) {
      const Place place = place_of(tile, target);
      T* home = packed + place.panel * padded * kPanelColumns + place.slot * kTileColumns * group;
      pack_full_tile<Group>((const char*)(weight + tile * kTileColumns * k), k / group, padded / group, (char*)home);
      return;
    }
    visit_tile(tile, n, k, group, target,
               [&](int64_t from, int64_t to) { packed[to] = from < 0 ? T(0) : weight[from]; });
  });
}

template <class T>
void unpack_as(const T* packed, int64_t n, int64_t k, int64_t group, PackTarget target, T* weight) {
  for_each_tile(n, k, target, [&](int64_t tile) {
    visit_tile(tile, n, k, group, target, [&](int64_t to, int64_t from) {
      if (to >= 0) weight[to] = packed[from];
    });
  });
}

}  // namespace

void pack(const char* weight, int64_t n, int64_t k, int32_t dtype, PackTarget target, char* packed) {
  if (dtype == kBFloat16) pack_as<uint16_t, uint32_t>((const uint16_t*)weight, n, k, target, (uint16_t*)packed);
  else if (dtype == kFloat16) pack_as<uint16_t, uint16_t>((const uint16_t*)weight, n, k, target, (uint16_t*)packed);
  else pack_as<uint32_t, uint32_t>((const uint32_t*)weight, n, k, target, (uint32_t*)packed);
}

void unpack(const char* packed, int64_t n, int64_t k, int32_t dtype, PackTarget target, char* weight) {
  const int64_t group = group_size(dtype);
  if (element_size(dtype) == 2) unpack_as((const uint16_t*)packed, n, k, group, target, (uint16_t*)weight);
  else unpack_as((const uint32_t*)packed, n, k, group, target, (uint32_t*)weight);
}

void advise_huge_pages(char* data, int64_t bytes) {
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = ((uintptr_t)data + kHuge - 1) / kHuge * kHuge, end = ((uintptr_t)data + bytes) / kHuge * kHuge;
  if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // a hint: refusal costs speed only
}
