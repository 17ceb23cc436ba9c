// Sixteen float lanes. Included inside an anonymous namespace by the AVX-512 translation units only.
typedef __m512 Vec;
static constexpr int kLanes = 16, kVectorRegisters = 32;

static inline Vec v_zero() { return _mm512_setzero_ps(); }
static inline Vec v_set(float x) { return _mm512_set1_ps(x); }
static inline Vec v_load(const float* p) { return _mm512_loadu_ps(p); }
static inline void v_store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
static inline __mmask16 v_mask(int64_t n) { return (__mmask16)((1u << n) - 1u); }
static inline Vec v_load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(v_mask(n), p); }
static inline void v_store_n(float* p, Vec x, int64_t n) { _mm512_mask_storeu_ps(p, v_mask(n), x); }
static inline Vec v_add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline Vec v_sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
static inline Vec v_mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
static inline Vec v_div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
static inline Vec v_fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// The second operand wins when either is NaN (so does the instruction).
static inline Vec v_max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
static inline Vec v_min(Vec a, Vec b) { return _mm512_min_ps(a, b); }

static inline Vec v_load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline Vec v_load_bf16_n(const uint16_t* p, int64_t n) {
  const __m256i half = _mm256_maskz_loadu_epi16(v_mask(n), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
static inline Vec v_load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
// bf16 pairs [16 columns][2 k] -> the even or the odd k of 16 columns.
static inline Vec v_pair_even(const char* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
static inline Vec v_pair_odd(const char* p) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0xffff0000u)));
}
// Round to nearest even; a NaN stays a quiet NaN. The same bits as VCVTNEPS2BF16 except that subnormals survive.
static inline __m256i v_to_bf16(Vec x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(rounded);
}
static inline void v_store_bf16(uint16_t* p, Vec x) { _mm256_storeu_si256((__m256i*)p, v_to_bf16(x)); }
static inline void v_store_bf16_n(uint16_t* p, Vec x, int64_t n) {
  _mm256_mask_storeu_epi16(p, v_mask(n), v_to_bf16(x));
}

// Within each 128 bits: a0 b0 a1 b1; a2 b2 a3 b3; a0 a1 b0 b1; a2 a3 b2 b3.
static inline Vec v_unpack_low(Vec a, Vec b) { return _mm512_unpacklo_ps(a, b); }
static inline Vec v_unpack_high(Vec a, Vec b) { return _mm512_unpackhi_ps(a, b); }
static inline Vec v_unpack_low_pairs(Vec a, Vec b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
static inline Vec v_unpack_high_pairs(Vec a, Vec b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}

// x0 x0 x1 x1 ... of the lower or the upper half of the lanes.
static inline Vec v_double_low(Vec x) {
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), x);
}
static inline Vec v_double_high(Vec x) {
  return _mm512_permutexvar_ps(_mm512_setr_epi32(8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15), x);
}
// Pairs (a, b) -> (a c - b s, b c + a s), with c and s given twice.
static inline Vec v_turn_pairs(Vec x, Vec c, Vec s) {
  const Vec straight = _mm512_mul_ps(x, c), crossed = _mm512_mul_ps(_mm512_permute_ps(x, 0xb1), s);
  return _mm512_mask_sub_ps(_mm512_add_ps(straight, crossed), 0x5555, straight, crossed);
}

// int8 codes as floats.
static inline Vec v_load_codes(const char* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
static inline Vec v_load_codes_n(const char* p, int64_t n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(v_mask(n), p)));
}

static inline __m128 v_fold(Vec x) {  // 16 lanes -> 4 sums, always in the same order
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
static inline void v_store_int(int32_t* p, Vec x) { _mm512_storeu_si512(p, _mm512_cvtps_epi32(x)); }  // nearest even
static inline float v_max_lane(Vec x) { return _mm512_reduce_max_ps(x); }

// 2^n for integral n in [-126, 127].
static inline Vec v_exponent(Vec n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }
static inline Vec v_round(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// where x < limit ? value : y; a NaN in x keeps y.
static inline Vec v_where_below(Vec x, float limit, Vec value, Vec y) {
  return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_LT_OQ), value);
}
static inline Vec v_where_above(Vec x, float limit, Vec value, Vec y) {
  return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_GT_OQ), value);
}
