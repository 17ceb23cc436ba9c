// The wrappers of csrc/amx_tiles.h one at a time, for test_amx_instructions.py to call.
#include <stdint.h>

namespace {
#include "amx_tiles.h"
}

extern "C" {

// c += a * b, tiles in memory with strides in bytes; all of memory at c is only written as far as the tile goes.
void probe_dot(const TileConfig* config, float* c, int64_t c_stride, const uint16_t* a, int64_t a_stride,
               const uint16_t* b, int64_t b_stride) {
  tile_configure(*config);
  tile_load<0>(c, c_stride);
  tile_load<1>(a, a_stride);
  tile_load<2, 64>((const char*)b - 64, b_stride);
  tile_dot_bf16<0, 1, 2>();
  tile_store<0>(c, c_stride);
  tile_release();
}

// Through tile 7, to one place as it was loaded and to another after it was zeroed.
void probe_copy(const TileConfig* config, const char* from, int64_t from_stride, char* to, char* zeroed, int64_t stride) {
  tile_configure(*config);
  tile_load<7>(from, from_stride);
  tile_store<7>(to, stride);
  tile_zero<7>();
  tile_store<7>(zeroed, stride);
  tile_release();
}

// Widens `blocks` blocks of 16 x 32 codes, each in the same buffer on the stack, tile by tile into `out`: what the
// kernels do with integer weights. With loads that the compiler may move, a tile would see an earlier block, or none.
void probe_widen(const uint8_t* codes, int64_t blocks, uint16_t* out) {
  TileConfig config = {};
  config.palette = 1;
  config.row_bytes[0] = config.row_bytes[1] = 64;
  config.rows[0] = config.rows[1] = 16;
  tile_configure(config);
  for (int64_t block = 0; block < blocks; ++block) {
    alignas(64) uint16_t buffer[512], back[512];
    for (int i = 0; i < 512; ++i) buffer[i] = (uint16_t)(codes[block * 512 + i] * 257 + 1);
    tile_load<0>(buffer, 64);
    for (int i = 0; i < 512; ++i) buffer[i] = (uint16_t)~buffer[i];
    tile_load<1>(buffer, 64);
    tile_store<0>(back, 64);
    for (int i = 0; i < 512; ++i) out[block * 1024 + i] = back[i];
    tile_store<1>(back, 64);
    for (int i = 0; i < 512; ++i) out[block * 1024 + 512 + i] = back[i];
  }
  tile_release();
}

// Uses of tiles that must not pass: before a configuration, of a tile it lacks, of shapes that do not fit.
void probe_misuse(int64_t how) {
  static char memory[4096];
  TileConfig config = {};
  config.palette = how == 3 ? 2 : 1;
  for (int t = 0; t < 3; ++t) {
    config.row_bytes[t] = 64;
    config.rows[t] = how == 4 ? 17 : 16;
  }
  if (how == 2) config.rows[2] = 8;
  if (how == 5) config.reserved[3] = 1;
  if (how != 0) tile_configure(config);
  if (how == 1) tile_load<5>(memory, 64);
  if (how == 6) __asm__ volatile("ud2");
  tile_load<0>(memory, 64);
  tile_dot_bf16<0, 1, 2>();
}
}
