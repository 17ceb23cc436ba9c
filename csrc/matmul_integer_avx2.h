// One tile of matmul_integer.h without VNNI. Pairs of products go to int16, which must not saturate:
//   int4: codes up to 15 times at most 127, eight pairs: 8 * 2 * 15 * 127 = 30480, then widened.
//   int8: up to 127 times at most 127, one pair, the sign moved to the other factor (w = code - 128, codes from 1).

// acc[row and plane][4] += one line (a tile pair: 4 vectors of 8 columns) of int4, in int16.
template <int RP>
static inline void add_nibbles(const char* line, const char* const* activations, int64_t k, __m256i (*acc)[4]) {
  const __m256i nibble = _mm256_set1_epi8(15);
  __m256i a[RP][2];
#pragma GCC unroll 2
  for (int r = 0; r < RP; ++r) {
    a[r][0] = _mm256_set1_epi32(load_four(activations[r] + k));
    a[r][1] = _mm256_set1_epi32(load_four(activations[r] + k + 4));
  }
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) {
    const __m256i both = _mm256_loadu_si256((const __m256i*)(line + n * 32));
    const __m256i low = _mm256_and_si256(both, nibble), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
#pragma GCC unroll 2
    for (int r = 0; r < RP; ++r) {
      const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, a[r][0]), _mm256_maddubs_epi16(high, a[r][1]));
      acc[r][n] = _mm256_add_epi16(acc[r][n], pairs);
    }
  }
}

// One line ahead for each that is read: in a burst they would wait for each other. Null: nothing to prefetch.
static inline void prefetch_line(const char* ahead, int line) {
  if (!ahead) return;
  _mm_prefetch(ahead + line * 128, _MM_HINT_T0);
  _mm_prefetch(ahead + line * 128 + 64, _MM_HINT_T0);
}

// The integers of one span: out[row and plane][4], int32, zero points not yet taken off for int4.
template <class F, int RP>
static inline void span_products(const char* lines, const char* ahead, const char* const* activations, int64_t first_k,
                                 __m256i (*out)[4]) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int r = 0; r < RP; ++r) {
    for (int n = 0; n < 4; ++n) out[r][n] = _mm256_setzero_si256();
  }
  if (F::kKind == kInt4) {
    for (int four = 0; four < F::kSpan / 32; ++four) {
      __m256i pairs[RP][4];
#pragma GCC unroll 2
      for (int r = 0; r < RP; ++r) {
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) pairs[r][n] = _mm256_setzero_si256();
      }
#pragma GCC unroll 4
      for (int line = 4 * four; line < 4 * four + 4; ++line) {
        prefetch_line(ahead, line);
        add_nibbles<RP>(lines + line * 128, activations, first_k + line * 8, pairs);
      }
#pragma GCC unroll 2
      for (int r = 0; r < RP; ++r) {
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) out[r][n] = _mm256_add_epi32(out[r][n], _mm256_madd_epi16(pairs[r][n], ones));
      }
    }
    return;
  }
  const __m256i flip = _mm256_set1_epi8((char)0x80);
  for (int line = 0; line < F::kSpan / 4; ++line) {
    prefetch_line(ahead, line);
    __m256i a[RP];
#pragma GCC unroll 2
    for (int r = 0; r < RP; ++r) a[r] = _mm256_set1_epi32(load_four(activations[r] + first_k + line * 4));
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      const __m256i w = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)(lines + line * 128 + n * 32)), flip);
      const __m256i size = _mm256_abs_epi8(w);  // one row alone: of the activation instead, once per line
#pragma GCC unroll 2
      for (int r = 0; r < RP; ++r) {
        const __m256i pairs = RP == 1 ? _mm256_maddubs_epi16(_mm256_abs_epi8(a[0]), _mm256_sign_epi8(w, a[0]))
                                      : _mm256_maddubs_epi16(size, _mm256_sign_epi8(a[r], w));
        out[r][n] = _mm256_add_epi32(out[r][n], _mm256_madd_epi16(pairs, ones));
      }
    }
  }
}

template <class F, int PLANES, int R, int P>
static void multiply_integer(const IntegerTile& t) {
  static_assert(P == 1, "one panel");
  constexpr int RP = R * PLANES;
  const char* activations[RP];
  for (int i = 0; i < RP; ++i) activations[i] = t.rows[i / PLANES] + i % PLANES * t.low;
  if (t.first_block == 0) __builtin_memset(t.sums, 0, R * kPanelColumns * sizeof(float));
  for (int64_t block = t.first_block; block < t.end_block; ++block) {
    const char* ahead = t.streams ? stream_ahead<F, P>(t, block, 0) : nullptr;
    if (!t.streams) prefetch_share<F>(t, block);
    for (int part = 0; part < kRowBlock / F::kSpan; ++part) {
      const int64_t group = scale_group<F>(t, block, part), first_k = block * kRowBlock + part * F::kSpan;
      __m256i products[RP][4];
      const char* lines = t.panels + t.header + first_k / F::kLineK * 128;
      span_products<F, RP>(lines, ahead, activations, first_k, products);
      if (ahead) ahead += F::kSpan / F::kLineK * 128;
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const int32_t minus = -span_sum<F>(t, r, block, part);
        const Vec own = v_set(((const float*)(t.rows[r] + t.scales))[block]);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
          __m256i total = products[r * PLANES][n];
          if (PLANES == 2) total = _mm256_add_epi32(_mm256_slli_epi32(total, 7), products[r * PLANES + PLANES - 1][n]);
          Vec factor = own;
          if (F::kKind == kInt4) {
            __m256i zero = _mm256_set1_epi32(F::kZeroPoint);
            const char* zeros = t.panels + t.zeros + group * kPanelColumns + n * 8;
            if (F::kZeros) zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)zeros));
            total = _mm256_add_epi32(total, _mm256_mullo_epi32(zero, _mm256_set1_epi32(minus)));
            const char* scales = t.panels + kPanelColumns * 4 + group * kPanelColumns * 2;
            factor = v_mul(v_load_f16((const uint16_t*)scales + n * 8), own);
          }
          float* sum = t.sums + r * kPanelColumns + n * 8;
          v_store(sum, v_fma(_mm256_cvtepi32_ps(total), factor, v_load(sum)));
        }
      }
    }
  }
}
