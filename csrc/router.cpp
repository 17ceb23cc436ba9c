// Router top-k. Ids are distinct and in range for any logits; ties go to the lowest id, for groups too. Scores are
// computed in double and compared as float, exactly as reference.py does, so both choose the same experts.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "ops.h"
#include "scratch.h"
#include "thread_pool.h"

namespace {

float finite(float x) {
  if (!(x > -FLT_MAX)) return -FLT_MAX;  // NaN and -inf
  return x > FLT_MAX ? FLT_MAX : x;
}

// The `count` best indices of values[0, size), best first, ties to the lowest; a value of -inf is out of the race
// unless nothing else is left. Insertion into a short sorted list: count is small.
void best(const float* values, int64_t size, int64_t count, int32_t* indices) {
  int64_t kept = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (kept == count && !(values[i] > values[indices[kept - 1]])) continue;
    int64_t at = kept < count ? kept++ : count - 1;
    for (; at > 0 && values[i] > values[indices[at - 1]]; --at) indices[at] = indices[at - 1];
    indices[at] = (int32_t)i;
  }
}

struct Row {
  double* scores;
  float* clean;       // finite logits
  float* choice;
  float* group_best;
  int32_t* group_ids;
};

void drop_other_groups(const Row& row, int64_t num_experts, const RouterRules& rules) {
  const int64_t size = num_experts / rules.num_groups;
  for (int64_t g = 0; g < rules.num_groups; ++g) {
    int32_t two[2] = {0, 0};
    best(row.choice + g * size, size, std::min<int64_t>(2, size), two);
    const float* group = row.choice + g * size;
    row.group_best[g] = group[two[0]] + (rules.top2_sum && size > 1 ? group[two[1]] : 0.0f);
  }
  best(row.group_best, rules.num_groups, rules.topk_groups, row.group_ids);
  int32_t* const end = row.group_ids + rules.topk_groups;
  for (int64_t g = 0; g < rules.num_groups; ++g) {
    if (std::find(row.group_ids, end, (int32_t)g) == end) {
      std::fill_n(row.choice + g * size, size, -INFINITY);
    }
  }
}

void route_row(const float* logits, int64_t num_experts, const float* bias, const RouterRules& rules, const Row& row,
               int32_t* ids, float* weights) {
  float top = -FLT_MAX;
  for (int64_t e = 0; e < num_experts; ++e) {
    row.clean[e] = finite(logits[e]);
    top = std::max(top, row.clean[e]);
  }
  double total = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const double x = row.clean[e];
    row.scores[e] = rules.sigmoid ? 1.0 / (1.0 + std::exp(-x)) : std::exp(x - top);
    total += row.scores[e];
  }
  if (!rules.sigmoid) {
    for (int64_t e = 0; e < num_experts; ++e) row.scores[e] /= total;
  }
  const bool by_logit = !rules.sigmoid && !bias && !rules.top2_sum;
  for (int64_t e = 0; e < num_experts; ++e) {
    const float score = by_logit ? row.clean[e] : (float)row.scores[e];
    row.choice[e] = finite(bias ? score + bias[e] : score);
  }
  if (rules.num_groups > 1) drop_other_groups(row, num_experts, rules);
  best(row.choice, num_experts, rules.top_k, ids);

  double sum = 0;
  float highest = -FLT_MAX;  // with a bias the first need not be it
  for (int64_t i = 0; i < rules.top_k; ++i) highest = std::max(highest, row.clean[ids[i]]);
  for (int64_t i = 0; i < rules.top_k; ++i) {
    if (rules.softmax_after_topk) row.scores[ids[i]] = std::exp((double)row.clean[ids[i]] - highest);
    sum += row.scores[ids[i]];
  }
  double factor = rules.routed_scaling;
  if (rules.softmax_after_topk) factor /= sum;
  else if (rules.normalise && sum + rules.norm_epsilon > 0) factor /= sum + rules.norm_epsilon;
  for (int64_t i = 0; i < rules.top_k; ++i) weights[i] = (float)(row.scores[ids[i]] * factor);
}

}  // namespace

void route(const float* logits, int64_t num_tokens, int64_t num_experts, const float* bias, const RouterRules& rules,
           int32_t* ids, float* weights) {
  constexpr int64_t kRows = 16;
  Scratch scratch;
  const int threads = num_threads();
  Row* rows = scratch.take<Row>(threads);
  for (int w = 0; w < threads; ++w) {
    rows[w] = {scratch.take<double>(num_experts), scratch.take<float>(num_experts), scratch.take<float>(num_experts),
               scratch.take<float>(rules.num_groups), scratch.take<int32_t>(rules.num_groups)};
  }
  Stage stage((num_tokens + kRows - 1) / kRows);
  run(num_tokens * num_experts > 4096, [&](int worker) {
    stage.drain([&](int64_t task) {
      for (int64_t t = task * kRows; t < std::min(num_tokens, (task + 1) * kRows); ++t) {
        route_row(logits + t * num_experts, num_experts, bias, rules, rows[worker], ids + t * rules.top_k,
                  weights + t * rules.top_k);
      }
    });
    stage.wait();
  });
}
