// The draw of one token: temperature, min-p, top-k, top-p and the inverse of the cumulative distribution, as
// moe_runtime/sampling.py writes them literally. One pass computes every weight; the filters then look only at the
// blocks of tokens that can matter, as sorting a whole vocabulary would take longer than the rest of the draw.
#include <algorithm>
#include <cmath>

#include "cpu_features.h"
#include "ops.h"
#include "scratch.h"

namespace {

constexpr float kDistances[] = {4.0f, 8.0f, 16.0f, INFINITY};  // from the best logit: where the tokens that matter are

// One row: y = (logit - best) / temperature and w = exp(y) per token, the largest y and the sum of w per block.
struct Row {
  int64_t size, blocks;
  float* y;
  float* w;
  float* block_best;
  double* block_mass;

  Row(const KernelTable& table, const float* logits, int64_t size, float best, float temperature, Scratch& scratch)
      : size(size), blocks((size + kSampleBlock - 1) / kSampleBlock), y(scratch.take<float>(size)),
        w(scratch.take<float>(size)), block_best(scratch.take<float>(blocks)), block_mass(scratch.take<double>(blocks)) {
    table.exponentials(logits, size, best, temperature, y, w, block_best, block_mass);
  }

  int64_t block_end(int64_t block) const { return std::min(size, (block + 1) * kSampleBlock); }

  // Ids of y >= bound and above -inf, ascending.
  int64_t collect(float bound, int32_t* ids) const {
    int64_t count = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      if (!(block_best[b] >= bound) || block_best[b] == -INFINITY) continue;
      for (int64_t i = b * kSampleBlock; i < block_end(b); ++i) {
        if (y[i] >= bound && y[i] > -INFINITY) ids[count++] = (int32_t)i;
      }
    }
    return count;
  }

  double mass(const int32_t* ids, int64_t count) const {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += w[ids[i]];
    return total;
  }
};

// The bound that top-k leaves: the k-th best of what min-p left; every token equal to it stays.
float top_k_bound(const Row& row, float bound, int64_t top_k, int32_t* ids) {
  for (const float distance : kDistances) {
    const int64_t count = row.collect(std::max(bound, -distance), ids);
    if (count < top_k) {
      if (-distance > bound) continue;
      return bound;
    }
    std::nth_element(ids, ids + top_k - 1, ids + count, [&](int32_t a, int32_t b) { return row.y[a] > row.y[b]; });
    return std::max(bound, row.y[ids[top_k - 1]]);
  }
  return bound;
}

// How many of the likeliest ids reach the wanted mass; moves them to the front. Quickselect, by mass: a flat
// distribution keeps most of the vocabulary, and sorting that costs milliseconds.
int64_t select_mass(const Row& row, int32_t* ids, int64_t count, double wanted) {
  const auto likelier = [&](int32_t a, int32_t b) { return row.y[a] > row.y[b] || (row.y[a] == row.y[b] && a < b); };
  int64_t low = 0, high = count;
  double reached = 0;  // of ids [0, low)
  while (high - low > 32) {
    const int64_t middle = low + (high - low) / 2;
    std::nth_element(ids + low, ids + middle, ids + high, likelier);
    const double mass = row.mass(ids + low, middle - low);
    if (reached + mass >= wanted) {
      high = middle;
    } else {
      reached += mass;
      low = middle;
    }
  }
  std::sort(ids + low, ids + high, likelier);
  while (low < high && reached < wanted) reached += row.w[ids[low++]];
  return low;
}

// Ids, ascending, of the smallest set of most likely tokens with top_p of the mass above `bound`.
int64_t nucleus(const Row& row, float bound, double top_p, int32_t* ids) {
  double total = 0;
  if (bound > -INFINITY) total = row.mass(ids, row.collect(bound, ids));
  else for (int64_t b = 0; b < row.blocks; ++b) total += row.block_mass[b];
  const double wanted = top_p * total;
  int64_t count = 0;
  for (const float distance : kDistances) {
    count = row.collect(std::max(bound, -distance), ids);
    if (row.mass(ids, count) >= wanted || -distance <= bound) break;
  }
  const int64_t kept = std::max<int64_t>(1, select_mass(row, ids, count, wanted));
  std::sort(ids, ids + kept);
  return kept;
}

// The token at `fraction` of the mass of `ids`, ascending; rounding may carry it beyond all mass: then the last with any.
int64_t draw_among(const Row& row, const int32_t* ids, int64_t count, double fraction) {
  const double target = fraction * row.mass(ids, count);
  double reached = 0;
  int64_t last = ids[0];
  for (int64_t i = 0; i < count; ++i) {
    reached += row.w[ids[i]];
    if (row.w[ids[i]] > 0) last = ids[i];
    if (reached > target) return ids[i];
  }
  return last;
}

int64_t draw_of_all(const Row& row, double total, double fraction) {
  double reached = 0;
  const double target = fraction * total;
  int64_t last = 0;
  for (int64_t b = 0; b < row.blocks; ++b) {
    if (!(row.block_mass[b] > 0)) continue;
    const bool here = reached + row.block_mass[b] > target;
    double inside = reached;
    for (int64_t i = b * kSampleBlock; here && i < row.block_end(b); ++i) {
      inside += row.w[i];
      if (row.w[i] > 0) last = i;
      if (inside > target) return i;
    }
    if (here) return last;
    reached += row.block_mass[b];
    for (int64_t i = row.block_end(b); i-- > b * kSampleBlock;) {
      if (row.w[i] > 0) {
        last = i;
        break;
      }
    }
  }
  return last;
}

}  // namespace

int64_t choose_token(const float* logits, int64_t size, const SamplingRules& rules) {
  const KernelTable& table = kernels();
  const float best = table.largest(logits, size);
  if (!std::isfinite(best)) return -1;
  Scratch scratch;
  const Row row(table, logits, size, best, (float)rules.temperature, scratch);
  double total = 0;
  for (int64_t b = 0; b < row.blocks; ++b) total += row.block_mass[b];
  if (!std::isfinite(total)) return -1;  // a NaN, which the search for the largest does not see
  const bool filtered = rules.min_p > 0 || (rules.top_k > 0 && rules.top_k < size) || rules.top_p < 1;
  if (!filtered) return draw_of_all(row, total, rules.fraction);
  int32_t* ids = scratch.take<int32_t>(size);
  float bound = rules.min_p > 0 ? (float)std::log(rules.min_p) : -INFINITY;
  if (rules.top_k > 0 && rules.top_k < size) bound = top_k_bound(row, bound, rules.top_k, ids);
  const int64_t kept = rules.top_p < 1 ? nucleus(row, bound, rules.top_p, ids) : row.collect(bound, ids);
  return draw_among(row, ids, kept, rules.fraction);
}
