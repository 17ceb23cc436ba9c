// Eight float lanes. Included inside an anonymous namespace by the AVX2 translation unit only.
typedef __m256 Vec;
static constexpr int kLanes = 8, kVectorRegisters = 16;

static inline Vec v_zero() { return _mm256_setzero_ps(); }
static inline Vec v_set(float x) { return _mm256_set1_ps(x); }
static inline Vec v_load(const float* p) { return _mm256_loadu_ps(p); }
static inline void v_store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
static inline __m256i v_mask(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline Vec v_load_n(const float* p, int64_t n) { return _mm256_maskload_ps(p, v_mask(n)); }
static inline void v_store_n(float* p, Vec x, int64_t n) { _mm256_maskstore_ps(p, v_mask(n), x); }
static inline Vec v_add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
static inline Vec v_sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
static inline Vec v_mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
static inline Vec v_div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
static inline Vec v_fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
// The second operand wins when either is NaN (so does the instruction).
static inline Vec v_max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static inline Vec v_min(Vec a, Vec b) { return _mm256_min_ps(a, b); }

static inline Vec v_widen_bf16(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
static inline Vec v_load_bf16(const uint16_t* p) { return v_widen_bf16(_mm_loadu_si128((const __m128i*)p)); }
static inline Vec v_load_bf16_n(const uint16_t* p, int64_t n) {
  uint16_t copy[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int64_t i = 0; i < n; ++i) copy[i] = p[i];
  return v_load_bf16(copy);
}
static inline Vec v_load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
// bf16 pairs [8 columns][2 k] -> the even or the odd k of 8 columns.
static inline Vec v_pair_even(const char* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16));
}
static inline Vec v_pair_odd(const char* p) {  // two shifts: a mask would be the 17th register of the 3 x 4 tile
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_srli_epi32(_mm256_loadu_si256((const __m256i*)p), 16), 16));
}
// Round to nearest even; a NaN stays a quiet NaN.
static inline __m128i v_to_bf16(Vec x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
static inline void v_store_bf16(uint16_t* p, Vec x) { _mm_storeu_si128((__m128i*)p, v_to_bf16(x)); }
static inline void v_store_bf16_n(uint16_t* p, Vec x, int64_t n) {
  uint16_t copy[8];
  v_store_bf16(copy, x);
  for (int64_t i = 0; i < n; ++i) p[i] = copy[i];
}

// Within each 128 bits: a0 b0 a1 b1; a2 b2 a3 b3; a0 a1 b0 b1; a2 a3 b2 b3.
static inline Vec v_unpack_low(Vec a, Vec b) { return _mm256_unpacklo_ps(a, b); }
static inline Vec v_unpack_high(Vec a, Vec b) { return _mm256_unpackhi_ps(a, b); }
static inline Vec v_unpack_low_pairs(Vec a, Vec b) {
  return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}
static inline Vec v_unpack_high_pairs(Vec a, Vec b) {
  return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}

// x0 x0 x1 x1 ... of the lower or the upper half of the lanes.
static inline Vec v_double_low(Vec x) { return _mm256_permutevar8x32_ps(x, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)); }
static inline Vec v_double_high(Vec x) { return _mm256_permutevar8x32_ps(x, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7)); }
// Pairs (a, b) -> (a c - b s, b c + a s), with c and s given twice.
static inline Vec v_turn_pairs(Vec x, Vec c, Vec s) {
  return _mm256_addsub_ps(_mm256_mul_ps(x, c), _mm256_mul_ps(_mm256_permute_ps(x, 0xb1), s));
}

// int8 codes as floats.
static inline Vec v_load_codes(const char* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
static inline Vec v_load_codes_n(const char* p, int64_t n) {
  char copy[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int64_t i = 0; i < n; ++i) copy[i] = p[i];
  return v_load_codes(copy);
}

static inline __m128 v_fold(Vec x) {  // 8 lanes -> 4 sums, always in the same order
  return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
}
static inline void v_store_int(int32_t* p, Vec x) {  // nearest even
  _mm256_storeu_si256((__m256i*)p, _mm256_cvtps_epi32(x));
}
static inline float v_max_lane(Vec x) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}

// 2^n for integral n in [-126, 127].
static inline Vec v_exponent(Vec n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline Vec v_round(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// where x < limit ? value : y; a NaN in x keeps y.
static inline Vec v_where_below(Vec x, float limit, Vec value, Vec y) {
  return _mm256_blendv_ps(y, value, _mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_LT_OQ));
}
static inline Vec v_where_above(Vec x, float limit, Vec value, Vec y) {
  return _mm256_blendv_ps(y, value, _mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_GT_OQ));
}
