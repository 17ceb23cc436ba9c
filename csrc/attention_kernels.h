// Attention of up to 16 rows over one part of a sequence: a softmax of its own, to be merged with the other parts'.
// Included inside an anonymous namespace.
#include "attention_scores.h"
#include "attention_values.h"

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

template <class C>
static void score_and_soften(const AttentionPart& a, float* scores) {
  score_all<C>(a, scores);
  __builtin_memset(a.out, 0, (size_t)a.num_rows * (size_t)a.value_dim * sizeof(float));
  for (int r = 0; r < a.num_rows; ++r) soften(scores + r * kAttentionPart, a.visible[r], a.max + r, a.sum + r);
}

template <class C>
static void attend(const AttentionPart& a) {
  alignas(64) float scores[kAttentionRows * kAttentionPart];
  score_and_soften<C>(a, scores);
  add_all_values<C>(a, scores);
}

static void attention_part(const AttentionPart* a) {
  if (a->row_dtype == kBFloat16) attend<RowsBF16>(*a);
  else attend<RowsF32>(*a);
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
    const Vec kept = v_mul(v_load_up_to(out + i, n), v_set(keep));
    v_store_up_to(out + i, v_fma(v_load_up_to(part_out + i, n), v_set(add), kept), n);
  }
}

static void attention_finish(const float* sum, const float* in, float* out, int64_t dim) {
  for (int64_t i = 0; i < dim; i += kLanes) {
    const int64_t n = dim - i < kLanes ? dim - i : kLanes;
    v_store_up_to(out + i, v_div(v_load_up_to(in + i, n), v_set(*sum)), n);
  }
}
