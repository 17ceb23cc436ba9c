// Attention over bf16 rows by VDPBF16PS. Included inside an anonymous namespace by translation units that have it.
//
// Queries and probabilities are rounded to bf16 (2^-9 of each), sums are float32. Values are multiplied two positions
// at a time, pairs beginning at even positions; a row that sees an odd number of them pairs its last one with zero.

struct RowsBF16Dot {
  static constexpr int kStep = 2 * kLanes, kBytes = 2, kQueryBytes = 2;
  static inline __mmask32 mask(int64_t n) { return (__mmask32)((1ull << n) - 1); }
  static inline Vec load(const char* p) { return _mm512_loadu_ps(p); }
  static inline Vec load_n(const char* p, int64_t n) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask(n), p));
  }
  static inline Vec query(const char* p) { return load(p); }
  static inline Vec query_n(const char* p, int64_t n) { return load_n(p, n); }
  static inline Vec mul_add(Vec a, Vec b, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
};

// Two positions' 32 columns interleaved: `low` has columns 0-3, 8-11, 16-19, 24-27 as pairs, `high` the others.
struct Pairs {
  Vec low, high;
};
static inline Pairs interleave(Vec first, Vec second) {
  const __m512i a = _mm512_castps_si512(first), b = _mm512_castps_si512(second);
  return {_mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b)), _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b))};
}
// 32 floats in natural order <-> the order of Pairs.
static inline Pairs load_sums(const float* p, int64_t n) {
  const Vec a = n < 16 ? v_load_n(p, n) : v_load(p), b = n < 32 ? v_load_n(p + 16, n < 16 ? 0 : n - 16) : v_load(p + 16);
  return {_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)};
}
static inline void store_sums(float* p, Pairs x, int64_t n) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  v_store_n(p, _mm512_permutex2var_ps(x.low, first, x.high), n < 16 ? n : 16);
  if (n > 16) v_store_n(p + 16, _mm512_permutex2var_ps(x.low, second, x.high), n - 16);
}

// out[R rows][N x 32 columns at d] += pairs of [first, end), first even. kWhole: all columns exist, else N = 1 and
// `columns` of them do.
template <int R, int N, bool kWhole>
static inline void add_pairs(const AttentionPart& a, int row, int64_t d, int64_t columns, int first, int end,
                             const uint16_t* probabilities) {
  const int64_t width = kWhole ? 32 : columns;
  Pairs sum[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[r][n] = load_sums(a.out + (row + r) * a.value_dim + d + n * 32, width);
  const auto load = [&](int key, int n) __attribute__((always_inline)) {
    const char* p = a.values[key] + (d + n * 32) * 2;
    return kWhole ? RowsBF16Dot::load(p) : RowsBF16Dot::load_n(p, width);
  };
  const auto add = [&](int key, bool last) __attribute__((always_inline)) {
    Pairs value[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) value[n] = interleave(load(key, n), last ? v_zero() : load(key + 1, n));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, probabilities + (row + r) * kAttentionPart + key, 4);
      const Vec p = _mm512_castsi512_ps(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        sum[r][n].low = RowsBF16Dot::mul_add(p, value[n].low, sum[r][n].low);
        sum[r][n].high = RowsBF16Dot::mul_add(p, value[n].high, sum[r][n].high);
      }
    }
  };
  int key = first;
  for (; key + 2 <= end; key += 2) add(key, false);
  if (key < end) add(key, true);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store_sums(a.out + (row + r) * a.value_dim + d + n * 32, sum[r][n], width);
}

template <int R>
static void add_row_pairs(const AttentionPart& a, int row, int first, int end, const uint16_t* probabilities) {
  constexpr int N = R <= 2 ? 4 : 2;
  int64_t d = 0;
  for (; d + N * 32 <= a.value_dim; d += N * 32) add_pairs<R, N, true>(a, row, d, 0, first, end, probabilities);
  for (; d + 32 <= a.value_dim; d += 32) add_pairs<R, 1, true>(a, row, d, 0, first, end, probabilities);
  if (d < a.value_dim) add_pairs<R, 1, false>(a, row, d, a.value_dim - d, first, end, probabilities);
}

// The pairs that all R rows see together, then what single rows see beyond.
template <int R>
static void add_rows_dot(const AttentionPart& a, int row, const uint16_t* probabilities) {
  int shared = a.visible[row];
  for (int r = 1; r < R; ++r) shared = a.visible[row + r] < shared ? a.visible[row + r] : shared;
  if (R > 1) shared &= ~1;
  add_row_pairs<R>(a, row, 0, shared, probabilities);
  for (int r = row; r < row + R && R > 1; ++r) {
    if (shared < a.visible[r]) add_row_pairs<1>(a, r, shared, a.visible[r], probabilities);
  }
}

static void attend_dot(const AttentionPart& a) {
  alignas(64) float scores[kAttentionRows * kAttentionPart];
  alignas(64) uint16_t probabilities[kAttentionRows * kAttentionPart];
  score_and_soften<RowsBF16Dot>(a, scores);
  for (int r = 0; r < a.num_rows; ++r) {
    const float* from = scores + r * kAttentionPart;
    uint16_t* to = probabilities + r * kAttentionPart;
    for (int i = 0; i < a.visible[r]; i += kLanes) {
      _mm256_store_si256((__m256i*)(to + i), (__m256i)_mm512_cvtneps_pbh(v_load(from + i)));
    }
    if (a.visible[r] & 1) to[a.visible[r]] = 0;
  }
  int row = 0;
  for (; row + 4 <= a.num_rows; row += 4) add_rows_dot<4>(a, row, probabilities);
  switch (a.num_rows - row) {
    case 1: return add_rows_dot<1>(a, row, probabilities);
    case 2: return add_rows_dot<2>(a, row, probabilities);
    case 3: return add_rows_dot<3>(a, row, probabilities);
  }
}

static void dequantize_row_dot(const char* row, void* out, int64_t dim) {
  uint16_t* to = (uint16_t*)out;
  int64_t i = 0;
  for (; i + 32 <= dim; i += 32) {
    const Vec scale = v_set(scale_of(row, dim, i));
    const Vec low = v_mul(v_load_codes(row + i), scale), high = v_mul(v_load_codes(row + i + 16), scale);
    _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  for (; i < dim; i += 16) {
    const int64_t n = dim - i < 16 ? dim - i : 16;
    v_store_bf16_n(to + i, v_mul(v_load_codes_n(row + i, n), v_set(scale_of(row, dim, i))), n);
  }
}

static void attention_part_dot(const AttentionPart* a) {
  if (a->row_dtype == kBFloat16) attend_dot(*a);
  else attend<RowsF32>(*a);
}
