// AMX (Sapphire Rapids and later): the AVX-512 BF16 table with bf16, int8 and int4 weights multiplied by tiles.
// Activations are rounded to bf16 once per call; weights are exact.
// No STL and nothing but the table leaves this file: an inline function compiled here must never be linked elsewhere.
#include <immintrin.h>

#include "kernel_table.h"

namespace {
#include "simd_avx512.h"
#include "row_kernels.h"
#include "matmul_kernels.h"
#include "amx_tiles.h"
#include "matmul_amx.h"
#include "peak_kernels.h"

template <bool GATE_UP>
static void int4_tile_matmul(const MatmulArgs* args) {
  if (format_zeros(args->format)) tile_matmul<PanelsInt4Zeros, GATE_UP>(args);
  else tile_matmul<PanelsInt4, GATE_UP>(args);
}
}  // namespace

extern "C" __attribute__((visibility("hidden"))) void moe_kernels_amx(KernelTable* table) {
  moe_kernels_avx512bf16(table);
  table->name = "amx";
  table->matmul[kBFloat16] = tile_matmul<PanelsBF16, false>;
  table->gate_up[kBFloat16] = tile_matmul<PanelsBF16, true>;
  table->input_rows[kInt8] = table->hidden_rows[kInt8] = kRowBFloat16;
  table->input_rows[kInt4] = table->hidden_rows[kInt4] = kRowBFloat16;
  table->peak[kBFloat16] = table->peak[kInt8] = table->peak[kInt4] = MOE_PEAK_TILES;
  table->matmul[kInt8] = tile_matmul<PanelsInt8, false>;
  table->gate_up[kInt8] = tile_matmul<PanelsInt8, true>;
  table->matmul[kInt4] = int4_tile_matmul<false>;
  table->gate_up[kInt4] = int4_tile_matmul<true>;
}
