// AVX2 + FMA + F16C.
// No STL and nothing but the table leaves this file: an inline function compiled here must never be linked elsewhere.
#include <immintrin.h>

#include "kernel_table.h"

namespace {
#include "simd_avx2.h"
#include "row_kernels.h"
#include "row_integers.h"
#include "matmul_kernels.h"
#include "matmul_integer.h"
#include "attention_kernels.h"
#include "peak_kernels.h"
#include "cache_rows.h"

}  // namespace

extern "C" __attribute__((visibility("hidden"))) void moe_kernels_avx2(KernelTable* table) {
  *table = {
      "avx2",
      {kRowFloat32, kRowFloat32, kRowFloat32, kRowInt8, kRowInt8},
      {kRowFloat32, kRowFloat32, kRowFloat32, kRowInt16, kRowInt16},
      {matmul<WeightsF32, false>, matmul<WeightsBF16Wide, false>, matmul<WeightsF16, false>,
       matmul_integer, matmul_integer},
      {matmul<WeightsF32, true>, matmul<WeightsBF16Wide, true>, matmul<WeightsF16, true>,
       gate_up_integer, gate_up_integer},
      convert,
      write_row,
      rms_norm,
      silu_mul,
      weighted_sum,
      largest,
      exponentials,
      quantize_row,
      dequantize_row,
      rotate,
      kFloat32,
      attention_part,
      attention_merge,
      attention_finish,
      {MOE_PEAK_FMA, MOE_PEAK_FMA, MOE_PEAK_FMA, MOE_PEAK_INT8, MOE_PEAK_INT4},
      read_memory,
  };
}
