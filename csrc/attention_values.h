// Sums of values weighted by probabilities, position by position. Included inside an anonymous namespace.
//
// A row never touches positions it may not see, so NaNs behind its back stay there.

// out[R rows][N vectors at column d] += sum over keys [first, end) of probability * value.
template <class C, int R, int N>
static inline void add_values(const AttentionPart& a, int row, int64_t d, int first, int end, const float* scores) {
  Vec sum[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[r][n] = v_load(a.out + (row + r) * a.value_dim + d + n * kLanes);
  for (int key = first; key < end; ++key) {
    Vec value[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) value[n] = C::load(a.values[key] + (d + n * kLanes) * C::kBytes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec p = v_set(scores[(row + r) * kAttentionPart + key]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[r][n] = v_fma(p, value[n], sum[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) v_store(a.out + (row + r) * a.value_dim + d + n * kLanes, sum[r][n]);
}

template <class C, int R>
static void add_row_values(const AttentionPart& a, int row, int first, int end, const float* scores) {
  constexpr int N = (kVectorRegisters == 32 ? 4 : 2) * (R <= 2 ? 2 : 1);
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
static void add_all_values(const AttentionPart& a, const float* scores) {
  int row = 0;
  for (; row + 4 <= a.num_rows; row += 4) add_rows<C, 4>(a, row, scores);
  switch (a.num_rows - row) {
    case 1: return add_rows<C, 1>(a, row, scores);
    case 2: return add_rows<C, 2>(a, row, scores);
    case 3: return add_rows<C, 3>(a, row, scores);
  }
}
