// A cache is [num_blocks][heads][block_size] rows of `dim` numbers: float32, bf16, or int8 codes. A row of an int8 cache
// is dim codes, padded to a multiple of 4, then one float32 scale for every 64 of them: a plain run of bytes, moved and
// freed like any other row. value = scale * code.
#pragma once
#include "layout.h"

static constexpr int64_t kScaleGroup = kRowBlock;
static constexpr int64_t int8_codes_bytes(int64_t dim) { return round_up(dim, 4); }
static constexpr int64_t cache_row_bytes(int64_t dim, int32_t dtype) {
  if (dtype != kInt8) return dim * element_size(dtype);
  return int8_codes_bytes(dim) + round_up(dim, kScaleGroup) / kScaleGroup * 4;
}
