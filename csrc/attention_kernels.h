// Attention of up to 16 rows over one part of a sequence. Included inside an anonymous namespace.
//
// A score is D / lanes multiply-adds per lane, folded in one fixed tree; the values are summed position by position.
// Neither depends on which rows share the part. A row never touches positions it may not see, so NaNs behind its
// back stay there.

// The sums of four vectors, in the four lanes.
static inline __m128 fold_four(Vec a, Vec b, Vec c, Vec d) {
  __m128 w = v_fold(a), x = v_fold(b), y = v_fold(c), z = v_fold(d);
  _MM_TRANSPOSE4_PS(w, x, y, z);
  return _mm_add_ps(_mm_add_ps(w, y), _mm_add_ps(x, z));
}

struct CacheF32 {
  static constexpr int kBytes = 4;
  static inline Vec load(const char* p) { return v_load((const float*)p); }
  static inline Vec load_n(const char* p, int64_t n) { return v_load_n((const float*)p, n); }
};
struct CacheBF16 {
  static constexpr int kBytes = 2;
  static inline Vec load(const char* p) { return v_load_bf16((const uint16_t*)p); }
  static inline Vec load_n(const char* p, int64_t n) { return v_load_bf16_n((const uint16_t*)p, n); }
};

// Scores of R rows against 4 keys.
template <class C, int R>
static inline void score_keys(const AttentionPart& a, int row, const char* const* keys, float* scores, int stride) {
  Vec sum[R][4];
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < 4; ++k) sum[r][k] = v_zero();
  int64_t d = 0;
  for (; d + kLanes <= a.key_dim; d += kLanes) {
    Vec key[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) key[k] = C::load(keys[k] + d * C::kBytes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec q = v_load(a.query[row + r] + d);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sum[r][k] = v_fma(q, key[k], sum[r][k]);
    }
  }
  const int64_t rest = a.key_dim - d;
  if (rest) {
    for (int r = 0; r < R; ++r) {
      const Vec q = v_load_n(a.query[row + r] + d, rest);
      for (int k = 0; k < 4; ++k) sum[r][k] = v_fma(q, C::load_n(keys[k] + d * C::kBytes, rest), sum[r][k]);
    }
  }
  const __m128 scale = _mm_set1_ps(a.scale);
  for (int r = 0; r < R; ++r) {
    _mm_storeu_ps(scores + r * stride, _mm_mul_ps(scale, fold_four(sum[r][0], sum[r][1], sum[r][2], sum[r][3])));
  }
}

template <class C>
static void score_all(const AttentionPart& a, float* scores) {
  constexpr int R = kVectorRegisters == 32 ? 4 : 2;
  for (int key = 0; key < a.num_keys; key += 4) {
    const char* keys[4];
    for (int k = 0; k < 4; ++k) keys[k] = a.keys[key + k < a.num_keys ? key + k : a.num_keys - 1];
    int row = 0;
    float* out = scores + key;
    for (; row + R <= a.num_rows; row += R, out += R * kAttentionPart) score_keys<C, R>(a, row, keys, out, kAttentionPart);
    switch (a.num_rows - row) {
      case 1: score_keys<C, 1>(a, row, keys, out, kAttentionPart); break;
      case 2: score_keys<C, 2>(a, row, keys, out, kAttentionPart); break;
      case 3: score_keys<C, 3>(a, row, keys, out, kAttentionPart); break;
    }
  }
}

// scores -> exp(scores - max) over the visible positions; returns max and sum.
static void soften(float* scores, int32_t visible, float* max_out, float* sum_out) {
  if (visible == 0) {
    *max_out = -__builtin_inff();
    *sum_out = 0.0f;
    return;
  }
  Vec max = v_set(-__builtin_inff());
  int32_t i = 0;
  for (; i + kLanes <= visible; i += kLanes) max = v_max(v_load(scores + i), max);
  for (; i < visible; ++i) max = v_max(v_set(scores[i]), max);
  const float top = v_max_lane(max);
  const Vec tops = v_set(top);
  Vec sum = v_zero();
  for (i = 0; i + kLanes <= visible; i += kLanes) {
    const Vec p = v_exp(v_sub(v_load(scores + i), tops));
    v_store(scores + i, p);
    sum = v_add(sum, p);
  }
  float total = fold_sum(v_fold(sum));
  if (i < visible) {
    v_store_n(scores + i, v_exp(v_sub(v_load_n(scores + i, visible - i), tops)), visible - i);
    for (; i < visible; ++i) total += scores[i];
  }
  *max_out = top;
  *sum_out = total;
}

// out[R rows][N vectors at column d] += sum over keys [first, end) of probability * value.
template <class C, int R, int N>
static inline void add_values(const AttentionPart& a, int row, int64_t d, int first, int end, const float* scores) {
  Vec sum[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[r][n] = v_load(a.out + (row + r) * a.value_dim + d + n * kLanes);
  for (int key = first; key < end; ++key) {
    Vec value[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) value[n] = C::load(a.values[key] + (d + n * kLanes) * C::kBytes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec p = v_set(scores[(row + r) * kAttentionPart + key]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[r][n] = v_fma(p, value[n], sum[r][n]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) v_store(a.out + (row + r) * a.value_dim + d + n * kLanes, sum[r][n]);
}

template <class C, int R>
static void add_row_values(const AttentionPart& a, int row, int first, int end, const float* scores) {
  constexpr int N = kVectorRegisters == 32 ? 4 : 2;
  int64_t d = 0;
  for (; d + N * kLanes <= a.value_dim; d += N * kLanes) add_values<C, R, N>(a, row, d, first, end, scores);
  for (; d + kLanes <= a.value_dim; d += kLanes) add_values<C, R, 1>(a, row, d, first, end, scores);
  const int64_t rest = a.value_dim - d;
  if (rest) {
    for (int r = row; r < row + R; ++r) {
      float* out = a.out + r * a.value_dim + d;
      Vec sum = v_load_n(out, rest);
      for (int key = first; key < end; ++key) {
        sum = v_fma(v_set(scores[r * kAttentionPart + key]), C::load_n(a.values[key] + d * C::kBytes, rest), sum);
      }
      v_store_n(out, sum, rest);
    }
  }
}

// The positions that all R rows see together, then what single rows see beyond.
template <class C, int R>
static void add_rows(const AttentionPart& a, int row, const float* scores) {
  int shared = a.visible[row];
  for (int r = 1; r < R; ++r) shared = a.visible[row + r] < shared ? a.visible[row + r] : shared;
  add_row_values<C, R>(a, row, 0, shared, scores);
  for (int r = row; r < row + R && R > 1; ++r) {
    if (shared < a.visible[r]) add_row_values<C, 1>(a, r, shared, a.visible[r], scores);
  }
}

template <class C>
static void attend(const AttentionPart& a) {
  alignas(64) float scores[kAttentionRows * kAttentionPart];
  score_all<C>(a, scores);
  __builtin_memset(a.out, 0, (size_t)a.num_rows * (size_t)a.value_dim * sizeof(float));
  for (int r = 0; r < a.num_rows; ++r) soften(scores + r * kAttentionPart, a.visible[r], a.max + r, a.sum + r);
  int row = 0;
  for (; row + 4 <= a.num_rows; row += 4) add_rows<C, 4>(a, row, scores);
  switch (a.num_rows - row) {
    case 1: return add_rows<C, 1>(a, row, scores);
    case 2: return add_rows<C, 2>(a, row, scores);
    case 3: return add_rows<C, 3>(a, row, scores);
  }
}

static void attention_part(const AttentionPart* a) {
  if (a->cache_dtype == kBFloat16) attend<CacheBF16>(*a);
  else attend<CacheF32>(*a);
}

static void attention_merge(float* max, float* sum, float* out, const float* part_max, const float* part_sum,
                            const float* part_out, int64_t dim) {
  const float inf = __builtin_inff();
  if (*part_sum == 0.0f && *part_max == -inf) return;  // the row sees nothing of this part
  // A NaN maximum (NaN scores) must win, so that it reaches the output.
  const float top = *part_max > *max || *part_max != *part_max ? *part_max : *max;
  float factors[kLanes];
  v_store(factors, v_exp(v_set(*max - top)));
  const float keep = *max == -inf ? 0.0f : factors[0];
  v_store(factors, v_exp(v_set(*part_max - top)));
  const float add = factors[0];
  *max = top;
  *sum = *sum * keep + *part_sum * add;
  for (int64_t i = 0; i < dim; i += kLanes) {
    const int64_t n = dim - i < kLanes ? dim - i : kLanes;
    v_store_n(out + i, v_fma(v_load_n(part_out + i, n), v_set(add), v_mul(v_load_n(out + i, n), v_set(keep))), n);
  }
}

static void attention_finish(const float* sum, const float* in, float* out, int64_t dim) {
  for (int64_t i = 0; i < dim; i += kLanes) {
    const int64_t n = dim - i < kLanes ? dim - i : kLanes;
    v_store_n(out + i, v_div(v_load_n(in + i, n), v_set(*sum)), n);
  }
}
