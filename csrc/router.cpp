// Router top-k. Ids are distinct and in range for any logits; ties go to the lowest id, for groups too. Scores are
// computed in double and compared as float, exactly as reference.py does, so both choose the same experts.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <string>

#include "errors.h"
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
template <class Number>
void best(const Number* values, int64_t size, int64_t count, int32_t* indices) {
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
  float* choice;      // what the choice is made by; -inf: out of the race
  double* group_best;
  int32_t* group_ids;
  int32_t* free_ids;  // the choice without a mask
  uint8_t* racing;    // experts of the mask, and those with a stand-in
};

// One token's question: which experts, of those it may use (allowed null: all)?
struct Question {
  int64_t num_experts;
  const float* bias;
  const RouterRules& rules;
  const uint8_t* allowed;

  bool may(int64_t e) const { return !allowed || allowed[e]; }
};

// Parts of the softmax among the allowed, or sigmoids; 0 for the forbidden.
void score(const Question& q, const Row& row) {
  float top = -FLT_MAX;
  for (int64_t e = 0; e < q.num_experts; ++e) {
    if (q.may(e)) top = std::max(top, row.clean[e]);
  }
  double total = 0;
  for (int64_t e = 0; e < q.num_experts; ++e) {
    const double x = row.clean[e];
    row.scores[e] = !q.may(e) ? 0.0 : q.rules.sigmoid ? 1.0 / (1.0 + std::exp(-x)) : std::exp(x - top);
    total += row.scores[e];
  }
  if (q.rules.sigmoid || !(total > 0)) return;
  for (int64_t e = 0; e < q.num_experts; ++e) row.scores[e] /= total;
}

void weigh_choice(const Question& q, const Row& row) {
  const bool by_logit = !q.rules.sigmoid && !q.bias && !q.rules.top2_sum;
  for (int64_t e = 0; e < q.num_experts; ++e) {
    const float value = by_logit ? row.clean[e] : (float)row.scores[e];
    row.choice[e] = q.may(e) ? finite(q.bias ? value + q.bias[e] : value) : -INFINITY;
  }
}

// Only allowed experts count for a group; one without any comes after all others.
void drop_other_groups(const Question& q, const Row& row) {
  const RouterRules& rules = q.rules;
  const int64_t size = q.num_experts / rules.num_groups;
  for (int64_t g = 0; g < rules.num_groups; ++g) {
    int32_t two[2] = {0, 0};
    const float* group = row.choice + g * size;
    best(group, size, std::min<int64_t>(2, size), two);
    const bool adds = rules.top2_sum && size > 1 && group[two[1]] > -INFINITY;
    const float sum = group[two[0]] + (adds ? group[two[1]] : 0.0f);
    row.group_best[g] = sum == -INFINITY && group[two[0]] > -INFINITY ? -DBL_MAX : sum;
  }
  best(row.group_best, rules.num_groups, rules.topk_groups, row.group_ids);
  int32_t* const end = row.group_ids + rules.topk_groups;
  for (int64_t g = 0; g < rules.num_groups; ++g) {
    if (std::find(row.group_ids, end, (int32_t)g) == end) {
      std::fill_n(row.choice + g * size, size, -INFINITY);
    }
  }
}

int64_t in_race(const Question& q, const Row& row) {
  return std::count_if(row.choice, row.choice + q.num_experts, [](float value) { return value > -INFINITY; });
}

// Where the race has fewer than top_k experts, which only a mask can do: the best allowed ones of the other groups,
// then the lowest forbidden ids.
void fill_up(const Question& q, const Row& row, int64_t found, int32_t* ids) {
  const int64_t top_k = q.rules.top_k;
  weigh_choice(q, row);
  for (int64_t i = 0; i < found; ++i) row.choice[ids[i]] = -INFINITY;
  const int64_t others = std::min(top_k - found, in_race(q, row));
  best(row.choice, q.num_experts, others, ids + found);
  found += others;
  for (int64_t e = 0; e < q.num_experts && found < top_k; ++e) {
    if (!q.may(e)) ids[found++] = (int32_t)e;
  }
}

void choose(const Question& q, const Row& row, int32_t* ids) {
  weigh_choice(q, row);
  if (q.rules.num_groups > 1) drop_other_groups(q, row);
  const int64_t found = q.allowed ? std::min(q.rules.top_k, in_race(q, row)) : q.rules.top_k;
  best(row.choice, q.num_experts, found, ids);
  if (found < q.rules.top_k) fill_up(q, row, found, ids);
}

void weigh(const Question& q, const Row& row, const int32_t* ids, float* weights) {
  const RouterRules& rules = q.rules;
  double sum = 0;
  float highest = -FLT_MAX;  // with a bias the first need not be it
  for (int64_t i = 0; i < rules.top_k; ++i) {
    if (q.may(ids[i])) highest = std::max(highest, row.clean[ids[i]]);
  }
  for (int64_t i = 0; i < rules.top_k; ++i) {
    if (rules.softmax_after_topk && q.may(ids[i])) {
      row.scores[ids[i]] = std::exp((double)row.clean[ids[i]] - highest);
    }
    sum += row.scores[ids[i]];
  }
  double factor = rules.routed_scaling;
  if (rules.softmax_after_topk) factor /= sum > 0 ? sum : 1.0;
  else if (rules.normalise && sum + rules.norm_epsilon > 0) factor /= sum + rules.norm_epsilon;
  for (int64_t i = 0; i < rules.top_k; ++i) weights[i] = (float)(row.scores[ids[i]] * factor);
}

// The part of the weight that the token's choice without its mask gives to experts that the mask forbids.
float lost_share(const Question& masked, const Row& row) {
  const Question free{masked.num_experts, masked.bias, masked.rules, nullptr};
  score(free, row);
  choose(free, row, row.free_ids);
  double total = 0, lost = 0;
  for (int64_t i = 0; i < free.rules.top_k; ++i) {
    const double part = row.scores[row.free_ids[i]];
    total += part;
    if (!masked.may(row.free_ids[i])) lost += part;
  }
  return total > 0 ? (float)(lost / total) : 0.0f;
}

void clean_logits(const float* logits, int64_t num_experts, const Row& row) {
  for (int64_t e = 0; e < num_experts; ++e) row.clean[e] = finite(logits[e]);
}

// What a mask's row does about the experts that it forbids.
struct Recovered {
  const float* offsets;
  const int32_t* stand_ins;

  // Changes the logits; who is in the race now.
  const uint8_t* enter(const float* logits, const uint8_t* allowed, int64_t num_experts, const Row& row) const {
    for (int64_t e = 0; e < num_experts; ++e) {
      row.clean[e] = finite(logits[e] + offsets[e]);
      row.racing[e] = allowed[e] || stand_ins[e] >= 0;
    }
    return row.racing;
  }
  // Winners that only a constant stands for take its name.
  void rename(const uint8_t* allowed, int64_t num_experts, int64_t top_k, int32_t* ids) const {
    for (int64_t i = 0; i < top_k; ++i) {
      const int32_t stand_in = stand_ins[ids[i]];
      if (!allowed[ids[i]] && stand_in >= 0) ids[i] = (int32_t)num_experts + stand_in;
    }
  }
};

void check_rows(const ExpertMasks& masks, int64_t num_tokens) {
  if (!masks.rows) return;
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (masks.rows[t] < -1 || masks.rows[t] >= masks.count) {
      throw KernelFault("route: mask_rows[" + std::to_string(t) + "] = " + std::to_string(masks.rows[t]) +
                        ", expected -1 <= row < " + std::to_string(masks.count));
    }
  }
}

}  // namespace

void route(const float* logits, int64_t num_tokens, int64_t num_experts, const float* bias, const RouterRules& rules,
           const ExpertMasks& masks, const RouteMeter& meter, int32_t* ids, float* weights) {
  constexpr int64_t kRows = 16;
  check_rows(masks, num_tokens);
  Scratch scratch;
  const int threads = num_threads();
  Row* rows = scratch.take<Row>(threads);
  for (int w = 0; w < threads; ++w) {
    rows[w] = {scratch.take<double>(num_experts),      scratch.take<float>(num_experts),
               scratch.take<float>(num_experts),       scratch.take<double>(rules.num_groups),
               scratch.take<int32_t>(rules.num_groups), scratch.take<int32_t>(rules.top_k),
               scratch.take<uint8_t>(masks.stand_ins ? num_experts : 0)};
  }
  const auto route_row = [&](int64_t t, const Row& row) {
    const int32_t mask = masks.rows ? masks.rows[t] : -1;
    const int64_t first = mask * num_experts;
    int32_t* const chosen = ids + t * rules.top_k;
    Question question{num_experts, bias, rules, mask < 0 ? nullptr : masks.allowed + first};
    const uint8_t* const allowed = question.allowed;
    clean_logits(logits + t * num_experts, num_experts, row);
    if (allowed && meter.lost) meter.lost[t] += lost_share(question, row);
    const bool recovers = allowed && masks.stand_ins;
    const Recovered recovered = recovers ? Recovered{masks.offsets + first, masks.stand_ins + first} : Recovered{};
    if (recovers) question.allowed = recovered.enter(logits + t * num_experts, allowed, num_experts, row);
    score(question, row);
    choose(question, row, chosen);
    weigh(question, row, chosen, weights + t * rules.top_k);
    if (recovers) recovered.rename(allowed, num_experts, rules.top_k, chosen);
    if (!allowed || !meter.outside) return;
    for (int64_t i = 0; i < rules.top_k; ++i) {
      const bool is_outside = chosen[i] < num_experts && !allowed[chosen[i]];
      if (is_outside) __atomic_fetch_add(meter.outside, 1, __ATOMIC_RELAXED);
    }
  };
  Stage stage((num_tokens + kRows - 1) / kRows);
  run(num_tokens * num_experts > 4096, [&](int worker) {
    stage.drain([&](int64_t task) {
      for (int64_t t = task * kRows; t < std::min(num_tokens, (task + 1) * kRows); ++t) route_row(t, rows[worker]);
    });
    stage.wait();
  });
}
