// How a matrix is cut into tiles of 16 columns and where a tile lies in its panel; shared by the packers.
#pragma once
#include "ops.h"
#include "thread_pool.h"

// Where tile `t` of a source matrix lives. A linear fills both tiles of a panel; gate and up fill one each.
struct Place {
  int64_t panel, slot;
};
inline Place place_of(int64_t tile, PackTarget target) {
  if (target == PackTarget::kLinear) return {tile / 2, tile % 2};
  return {tile, target == PackTarget::kGate ? 0 : 1};
}

inline int64_t num_tiles(int64_t n, PackTarget target) {
  return round_up(n, target == PackTarget::kLinear ? kPanelColumns : kTileColumns) / kTileColumns;
}

template <class F>
void for_each_tile(int64_t n, int64_t k, PackTarget target, F body) {
  SlicedStage stage(1, num_tiles(n, target));
  run(n * k > (1 << 16), [&](int) {
    stage.drain([&](int64_t, int64_t tile) { body(tile); });
    stage.wait();
  });
}
