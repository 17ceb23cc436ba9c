// The packed weight layout, version 1. Stated here once; pack.cpp writes it, the kernels read it.
//
// A matrix [N, K] (row = output column n, as checkpoints store it) becomes panels of 32 output columns:
//
//   [N / 32 panels][K / G groups][2 tiles][16 columns][G consecutive k]      G = 2 for bf16, 1 for fp16 and fp32
//
// * One tile row (16 columns x one group) of bf16 is 64 bytes: one cache line, one zmm for VDPBF16PS, and one row of
//   an AMX B tile. An AMX kernel loads 16 such rows (K = 32) with stride 128 from the same bytes; that is why K is
//   zero-padded to 32 and N to 32.
// * For experts, gate and up share panels: tile 0 is 16 columns of gate, tile 1 the same 16 columns of up, so that one
//   contiguous stream feeds both and SiLU(gate) * up happens in registers. Intermediate width is padded to 16.
// * A panel is contiguous, panels follow each other, so a range of output columns is one stream of memory.
#pragma once
#include <stdint.h>

#define MOE_LAYOUT_VERSION 1

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

static constexpr int64_t kTileColumns = 16, kPanelColumns = 32, kPadK = 32;

// `static`, not `inline`: a copy compiled for AVX-512 must never be the one the linker keeps for everybody.
static constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
static constexpr int64_t element_size(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }
static constexpr int64_t group_size(int32_t dtype) { return dtype == kBFloat16 ? 2 : 1; }
static constexpr int64_t panel_bytes(int64_t k, int32_t dtype) {
  return round_up(k, kPadK) * kPanelColumns * element_size(dtype);
}
static constexpr int64_t packed_bytes(int64_t n, int64_t k, int32_t dtype) {
  return round_up(n, kPanelColumns) / kPanelColumns * panel_bytes(k, dtype);
}
static constexpr int64_t packed_gate_up_bytes(int64_t intermediate, int64_t hidden, int32_t dtype) {
  return round_up(intermediate, kTileColumns) / kTileColumns * panel_bytes(hidden, dtype);
}
