// One tile of matmul_integer.h with VPDPBUSD: unsigned weights, four signed activations broadcast to all columns.
// Registers: 6 rows (or 3 of two planes) x 4 vectors of integers; the float sums stay in L1, touched once per span.

// In asm, because gcc 12 copies the accumulators of the intrinsic through memory in every turn of the loop.
static inline void dot(__m512i& sum, __m512i weights, const int32_t* activations) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(*activations));
}

template <class F, int PLANES, int R, int P>
static void multiply_integer(const IntegerTile& t) {
  constexpr int N = 2 * P, kHalves = F::kKind == kInt4 ? 2 : 1;
  const __m512i nibble = _mm512_set1_epi8(15);
  if (!t.first_block) __builtin_memset(t.sums, 0, R * N * 64);
  const char* panels[P];
  for (int p = 0; p < P; ++p) panels[p] = t.panels + p * t.panel_stride;

  for (int64_t block = t.first_block; block < t.end_block; ++block) {
    for (int p = 0; t.streams && p < P; ++p) {
      const char* ahead = stream_ahead<F, P>(t, block, p);
      for (int64_t i = 0; i < F::kBlockBytes; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T0);
    }
    if (!t.streams) prefetch_share<F>(t, block);
    for (int part = 0; part < kRowBlock / F::kSpan; ++part) {
      const int64_t group = scale_group<F>(t, block, part);
      __m512i acc[R][PLANES][N];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {  // minus zero point times the sum of activations, in the last plane
        const int32_t minus = -span_sum<F>(t, r, block, part);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          acc[r][0][n] = _mm512_setzero_si512();
          if (F::kZeros) {
            const char* zeros = panels[n / 2] + t.zeros + group * kPanelColumns + n % 2 * 16;
            const __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)zeros));
            acc[r][PLANES - 1][n] = _mm512_mullo_epi32(zero, _mm512_set1_epi32(minus));
          } else {
            acc[r][PLANES - 1][n] = _mm512_set1_epi32(minus * F::kZeroPoint);
          }
        }
      }
      const int64_t first_k = block * kRowBlock + part * F::kSpan;
      const int64_t first_line = t.header + first_k / F::kLineK * 128;
      for (int line = 0; line < F::kSpan / F::kLineK; ++line) {
#pragma GCC unroll 2
        for (int half = 0; half < kHalves; ++half) {
          __m512i w[N];
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) {
            w[n] = _mm512_loadu_si512(panels[n / 2] + first_line + line * 128 + n % 2 * 64);
            if (half) w[n] = _mm512_srli_epi16(w[n], 4);
            if (F::kKind == kInt4) w[n] = _mm512_and_si512(w[n], nibble);
          }
          const int64_t k = first_k + line * F::kLineK + half * 4;
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
            for (int plane = 0; plane < PLANES; ++plane) {
              const int32_t* a = (const int32_t*)(t.rows[r] + plane * t.low + k);
#pragma GCC unroll 8
              for (int n = 0; n < N; ++n) dot(acc[r][plane][n], w[n], a);
            }
          }
        }
      }
      Vec scale[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        if (F::kKind == kInt8) continue;
        const char* scales = panels[n / 2] + kPanelColumns * 4 + group * kPanelColumns * 2;
        scale[n] = v_load_f16((const uint16_t*)scales + n % 2 * 16);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec own = v_set(((const float*)(t.rows[r] + t.scales))[block]);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          __m512i total = acc[r][0][n];
          if (PLANES == 2) total = _mm512_add_epi32(_mm512_slli_epi32(total, 7), acc[r][1][n]);
          const Vec factor = F::kKind == kInt8 ? own : v_mul(scale[n], own);
          float* home = t.sums + (r * N + n) * 16;
          v_store(home, v_fma(_mm512_cvtepi32_ps(total), factor, v_load(home)));
        }
      }
    }
  }
}
