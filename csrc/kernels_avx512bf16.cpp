// AVX-512 BF16 (Cooper Lake, Sapphire Rapids, Zen 4): the AVX-512 table with bf16 weights multiplied by VDPBF16PS.
// Activations are rounded to bf16 once per call; VDPBF16PS treats subnormals as zero and sums in float32.
// No STL and nothing but the table leaves this file: an inline function compiled here must never be linked elsewhere.
#include <immintrin.h>

#include "kernel_table.h"

namespace {
#include "simd_avx512.h"
#include "row_kernels.h"
#include "row_integers.h"
#include "matmul_kernels.h"
#include "peak_kernels.h"
#include "attention_kernels.h"
#include "cache_rows.h"
#include "attention_dot.h"

struct WeightsBF16Dot {
  static constexpr int kSteps = 1, kLineBytes = kLanes * 4, kRow = kRowBFloat16;
  static inline Vec load(const char* p, int) { return v_load((const float*)p); }
  static inline Vec broadcast(const char* row, int64_t group, int) {
    int32_t pair;
    __builtin_memcpy(&pair, row + group * 4, 4);
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
  }
  static inline Vec mul_add(Vec sum, Vec a, Vec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
};
}  // namespace

extern "C" __attribute__((visibility("hidden"))) void moe_kernels_avx512bf16(KernelTable* table) {
  moe_kernels_avx512(table);
  table->name = "avx512bf16";
  table->input_rows[kBFloat16] = table->hidden_rows[kBFloat16] = kRowBFloat16;
  table->matmul[kBFloat16] = matmul<WeightsBF16Dot, false>;
  table->gate_up[kBFloat16] = matmul<WeightsBF16Dot, true>;
  table->peak[kBFloat16] = MOE_PEAK_BF16;
  table->dequantize_row = dequantize_row_dot;
  table->attention_query = kBFloat16;
  table->attention_part = attention_part_dot;
}
