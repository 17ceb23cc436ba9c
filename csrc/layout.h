// The packed weight layout, version 2. Stated here once; pack*.cpp write it, the kernels read it.
//
// A matrix [N, K] (row = output column n, as checkpoints store it) becomes panels of 32 output columns:
//
//   panel = [header][K / G groups][2 tiles][16 columns][G consecutive k]
//   G     = 2 for bf16, 1 for fp16 and fp32, 4 for int8, 8 for int4
//
// * One tile row (16 columns x one group) of bf16, int8 or int4 is 64 bytes: one cache line, one zmm, and (bf16, int8)
//   one row of an AMX B tile, 16 of which are loaded with stride 128. That is why K is zero-padded to 32 (bf16, fp16,
//   fp32), to 64 (int8), to 64 or the scale group if that is larger (int4), and N to 32.
// * int8 and int4 codes are unsigned, the operand that VPDPBUSD and TDPBSUD want unsigned. A byte of int4 holds k in its
//   low half and k + 4 in its high half: byte j of a column's four holds k = 8 * group + j and 8 * group + 4 + j.
//     int8: value = column_scale * (code - 128)             header: float32 column_scale[32]
//     int4: value = column_scale * group_scale * (code - z) header: float32 column_scale[32], float16
//           group_scale[K / group][32], and, in formats with zeros, uint8 zero[K / group][32]; else z = 8
//   The header is padded to 64 bytes; padding has scale 1 and codes equal to the zero point.
// * For experts, gate and up share panels: tile 0 is 16 columns of gate, tile 1 the same 16 columns of up, so that one
//   contiguous stream feeds both and SiLU(gate) * up happens in registers. Intermediate width is padded to 16.
// * A panel is contiguous, panels follow each other, so a range of output columns is one stream of memory.
#pragma once
#include <stdint.h>

#define MOE_LAYOUT_VERSION 2

// `static`, not `inline`, everywhere below: a copy compiled for AVX-512 must never be the one the linker keeps for all.

// The first three are also the types of activations and caches.
enum Kind : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kInt4 = 4 };
static constexpr int kNumKinds = 5;

// A weight format is one number, kind | scale group << 8 | zeros << 24; plain kinds are their own number.
static constexpr int32_t format_kind(int32_t format) { return format & 0xff; }
static constexpr int64_t format_group(int32_t format) { return format >> 8 & 0xffff; }
static constexpr bool format_zeros(int32_t format) { return format >> 24 & 1; }
static constexpr bool is_integer(int32_t format) { return format_kind(format) >= kInt8; }

static constexpr int64_t kTileColumns = 16, kPanelColumns = 32;

static constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
static constexpr int64_t element_size(int32_t plain) { return plain == kFloat32 ? 4 : 2; }
static constexpr int64_t group_size(int32_t format) {  // G
  return format_kind(format) == kBFloat16 ? 2 : format_kind(format) == kInt8 ? 4 : format_kind(format) == kInt4 ? 8 : 1;
}
static constexpr int64_t group_bytes(int32_t format) {  // of one group: 32 columns
  return is_integer(format) ? 128 : kPanelColumns * group_size(format) * element_size(format_kind(format));
}
static constexpr int64_t padded_k(int64_t k, int32_t format) {
  const int64_t unit = !is_integer(format) ? 32 : format_group(format) > 64 ? format_group(format) : 64;
  return round_up(k, unit);
}
static constexpr int64_t scale_groups(int64_t k, int32_t format) {
  return format_kind(format) == kInt4 ? padded_k(k, format) / format_group(format) : 0;
}
static constexpr int64_t zeros_offset(int64_t k, int32_t format) {  // of zero[][] in the header
  return kPanelColumns * (4 + 2 * scale_groups(k, format));
}
static constexpr int64_t header_bytes(int64_t k, int32_t format) {
  if (!is_integer(format)) return 0;
  return round_up(zeros_offset(k, format) + (format_zeros(format) ? kPanelColumns * scale_groups(k, format) : 0), 64);
}
static constexpr int64_t panel_bytes(int64_t k, int32_t format) {
  return header_bytes(k, format) + padded_k(k, format) / group_size(format) * group_bytes(format);
}
static constexpr int64_t packed_bytes(int64_t n, int64_t k, int32_t format) {
  return round_up(n, kPanelColumns) / kPanelColumns * panel_bytes(k, format);
}
static constexpr int64_t packed_gate_up_bytes(int64_t intermediate, int64_t hidden, int32_t format) {
  return round_up(intermediate, kTileColumns) / kTileColumns * panel_bytes(hidden, format);
}

// Activation rows as the kernels read them. For integer weights a row is quantised in blocks of 64 k:
//   kRowInt8:  int8 q[K], float32 scale[K / 64], int32 sum[K / 32]         x = scale * q
//   kRowInt16: int8 high[K], int8 low[K], scale, sum                       x = scale * (128 * high + low)
// K is padded to 64 with zeros; sum[i] is that of the (combined) integers of 32 k, for the weights' zero points.
enum RowType : int32_t { kRowFloat32 = 0, kRowBFloat16 = 1, kRowInt8 = 3, kRowInt16 = 4 };
static constexpr int64_t kRowBlock = 64;

static constexpr int64_t row_planes(int32_t type) { return type == kRowInt16 ? 2 : 1; }
static constexpr int64_t row_scales_offset(int64_t k, int32_t type) { return row_planes(type) * round_up(k, kRowBlock); }
static constexpr int64_t row_sums_offset(int64_t k, int32_t type) {
  return row_scales_offset(k, type) + 4 * (round_up(k, kRowBlock) / kRowBlock);
}
static constexpr int64_t row_bytes(int64_t k, int32_t type) {
  if (type == kRowFloat32 || type == kRowBFloat16) return round_up(k, 2) * element_size(type);  // bf16 weights are pairs
  return round_up(row_sums_offset(k, type) + 8 * (round_up(k, kRowBlock) / kRowBlock), 64);
}
