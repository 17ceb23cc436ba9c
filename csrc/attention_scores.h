// Scores of up to 16 query rows against the keys of one part. Included inside an anonymous namespace.
//
// A score is key_dim / kStep multiply-adds per lane, folded in one fixed tree: which rows and keys are computed side
// by side changes no bit.

struct RowsF32 {
  static constexpr int kStep = kLanes, kBytes = 4, kQueryBytes = 4;
  static inline Vec load(const char* p) { return v_load((const float*)p); }
  static inline Vec load_n(const char* p, int64_t n) { return v_load_n((const float*)p, n); }
  static inline Vec query(const char* p) { return v_load((const float*)p); }
  static inline Vec query_n(const char* p, int64_t n) { return v_load_n((const float*)p, n); }
  static inline Vec mul_add(Vec q, Vec key, Vec sum) { return v_fma(q, key, sum); }
};
struct RowsBF16 : RowsF32 {
  static constexpr int kBytes = 2;
  static inline Vec load(const char* p) { return v_load_bf16((const uint16_t*)p); }
  static inline Vec load_n(const char* p, int64_t n) { return v_load_bf16_n((const uint16_t*)p, n); }
};

// The sums of four vectors, in the four lanes.
static inline __m128 fold_four(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = v_add(v_unpack_low(a, b), v_unpack_high(a, b)), cd = v_add(v_unpack_low(c, d), v_unpack_high(c, d));
  return v_fold(v_add(v_unpack_low_pairs(ab, cd), v_unpack_high_pairs(ab, cd)));
}

// R rows against K keys; K is a multiple of four.
template <class C, int R, int K>
static inline void score_keys(const AttentionPart& a, int row, const char* const* keys, float* scores) {
  Vec sum[R][K];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) sum[r][k] = v_zero();
  const auto accumulate = [&](auto load_key, auto load_query) __attribute__((always_inline)) {
    Vec query[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) query[r] = load_query(a.query[row + r]);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      const Vec key = load_key(keys[k]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][k] = C::mul_add(query[r], key, sum[r][k]);
    }
  };
  int64_t d = 0;
  for (; d + C::kStep <= a.key_dim; d += C::kStep) {
    accumulate([d](const char* p) __attribute__((always_inline)) { return C::load(p + d * C::kBytes); },
               [d](const char* p) __attribute__((always_inline)) { return C::query(p + d * C::kQueryBytes); });
  }
  if (const int64_t n = a.key_dim - d) {
    accumulate([d, n](const char* p) __attribute__((always_inline)) { return C::load_n(p + d * C::kBytes, n); },
               [d, n](const char* p) __attribute__((always_inline)) { return C::query_n(p + d * C::kQueryBytes, n); });
  }
  const __m128 scale = _mm_set1_ps(a.scale);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int k = 0; k < K; k += 4) {
      const __m128 sums = fold_four(sum[r][k], sum[r][k + 1], sum[r][k + 2], sum[r][k + 3]);
      _mm_storeu_ps(scores + r * kAttentionPart + k, _mm_mul_ps(scale, sums));
    }
  }
}

// A part is 256 rows in many places, each too short for the hardware to see a stream: ask for keys ahead of their use.
template <class C>
static inline void prefetch_ahead(const AttentionPart& a, int key, int count) {
  constexpr int64_t kAhead = 4096;  // bytes
  const int64_t bytes = a.key_dim * C::kBytes;
  const int first = key + (int)(kAhead / bytes) + 1;
  for (int i = first; i < first + count && i < a.num_keys; ++i) {
    for (int64_t line = 0; line < bytes; line += 64) _mm_prefetch(a.keys[i] + line, _MM_HINT_T0);
  }
}

template <class C, int K>
static inline void score_group(const AttentionPart& a, int key, float* scores) {
  constexpr int R = kVectorRegisters == 32 ? 4 : 2;
  const char* keys[K];
  for (int k = 0; k < K; ++k) keys[k] = a.keys[key + k < a.num_keys ? key + k : a.num_keys - 1];
  if (a.cold) prefetch_ahead<C>(a, key, K);
  float* out = scores + key;
  int row = 0;
  for (; row + R <= a.num_rows; row += R, out += R * kAttentionPart) score_keys<C, R, K>(a, row, keys, out);
  switch (a.num_rows - row) {
    case 1: return score_keys<C, 1, K>(a, row, keys, out);
    case 2: return score_keys<C, 2, K>(a, row, keys, out);
    case 3: return score_keys<C, 3, K>(a, row, keys, out);
  }
}

// scores [16, 256]; those of positions that a row may not see are computed, and never used.
template <class C>
static void score_all(const AttentionPart& a, float* scores) {
  if (a.num_rows == 1) {  // a row alone needs more keys at once to keep the multipliers busy
    for (int key = 0; key < a.num_keys; key += 8) score_group<C, 8>(a, key, scores);
  } else {
    for (int key = 0; key < a.num_keys; key += 4) score_group<C, 4>(a, key, scores);
  }
}
