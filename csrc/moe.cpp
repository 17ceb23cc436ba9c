// Fused mixture of experts: gate, up, SiLU, down and the weighted sum in one fork.
//
//   0. counting sort of (token, slot) pairs by expert; x converted once to the row type the kernels read
//   1. tasks (expert, gate/up panels): h = silu(gate) * up for the expert's rows, in sorted order
//   2. tasks (output columns): every expert's down projection into a small private block, then each token's sum over
//      its slots, in slot order. A task owns its columns: no atomics, no third barrier, nothing of size [T * k, H].
//
// Each weight is read from memory once, whatever the number of tokens that chose its expert.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "activations.h"
#include "cpu_features.h"
#include "errors.h"
#include "ops.h"

namespace {

constexpr int64_t kParallelFrom = 1 << 17;

// Pairs sorted by expert: expert e owns rows [first[e], first[e + 1]).
struct Sorted {
  int64_t* first;        // [E + 1]
  int32_t* token_of;     // sorted row -> token
  int64_t* row_of;       // pair -> sorted row; -1 - c: constant c, which is no row
  int32_t* active;       // experts with rows, busiest first, so that no long task comes last
  int64_t num_active = 0;
};

Sorted sort_by_expert(const int32_t* ids, const MoeShape& s, int64_t num_constants, Scratch& scratch) {
  const int64_t pairs = s.num_tokens * s.top_k;
  Sorted sorted{scratch.take<int64_t>(s.num_experts + 1), scratch.take<int32_t>(pairs), scratch.take<int64_t>(pairs),
                scratch.take<int32_t>(s.num_experts)};
  std::fill_n(sorted.first, s.num_experts + 1, 0);
  for (int64_t p = 0; p < pairs; ++p) {
    if (ids[p] < 0 || ids[p] >= s.num_experts + num_constants) {
      throw KernelFault("fused_moe: expert_ids[" + std::to_string(p / s.top_k) + ", " + std::to_string(p % s.top_k) +
                        "] = " + std::to_string(ids[p]) + ", expected 0 <= id < " +
                        std::to_string(s.num_experts + num_constants));
    }
    if (ids[p] < s.num_experts) ++sorted.first[ids[p] + 1];
  }
  for (int64_t e = 0; e < s.num_experts; ++e) {
    if (sorted.first[e + 1]) sorted.active[sorted.num_active++] = (int32_t)e;
  }
  std::stable_sort(sorted.active, sorted.active + sorted.num_active,
                   [&](int32_t a, int32_t b) { return sorted.first[a + 1] > sorted.first[b + 1]; });
  std::partial_sum(sorted.first, sorted.first + s.num_experts + 1, sorted.first);
  int64_t* next = scratch.take<int64_t>(s.num_experts);
  std::copy_n(sorted.first, s.num_experts, next);
  for (int64_t p = 0; p < pairs; ++p) {
    if (ids[p] >= s.num_experts) {
      sorted.row_of[p] = s.num_experts - 1 - ids[p];
      continue;
    }
    const int64_t row = next[ids[p]]++;
    sorted.row_of[p] = row;
    sorted.token_of[row] = (int32_t)(p / s.top_k);
  }
  return sorted;
}

struct Call {
  const KernelTable& table;
  const MoeShape& shape;
  const Sorted& sorted;
  const char* gate_up;
  const char* down;
  int32_t format;
  int64_t hidden_width;  // I padded to 16
  char* h;               // [pairs, hidden_width] in the hidden row type
  int64_t h_stride;      // bytes
  const float* constants;  // [*, H]

  int32_t hidden_type() const { return table.hidden_rows[format_kind(format)]; }
};

void gate_up_task(const Call& c, const Activations& rows, int32_t expert, int64_t panel, int64_t num_panels) {
  const int64_t first = c.sorted.first[expert];
  MatmulArgs args = {};
  args.rows = rows.row(0);
  args.row_stride = rows.stride();
  args.row_type = rows.type();
  args.row_index = c.sorted.token_of + first;
  args.num_rows = c.sorted.first[expert + 1] - first;
  args.panel_stride = panel_bytes(c.shape.hidden, c.format);
  args.panels = c.gate_up + expert * packed_gate_up_bytes(c.shape.intermediate, c.shape.hidden, c.format) +
                panel * args.panel_stride;
  args.num_panels = num_panels;
  args.format = c.format;
  args.k = c.shape.hidden;
  args.out = c.h + first * c.h_stride;
  args.out_stride = c.h_stride;
  args.first_hidden = panel * kTileColumns;
  args.hidden = c.hidden_width;
  c.table.gate_up[format_kind(c.format)](&args);
}

// The beginning of the panels that come next: the hardware follows a stream, but cannot guess where one starts.
void prefetch_start(const char* panels, const MatmulArgs& args) {
  constexpr int64_t kBytes = 1024;
  for (int64_t p = 0; p < args.num_panels; ++p) {
    for (int64_t at = 0; at < kBytes; at += 64) __builtin_prefetch(panels + p * args.panel_stride + at);
  }
}

// Columns [column, column + width) of every sorted row -> block [pairs, width].
void down_task(const Call& c, int64_t column, int64_t width, float* block) {
  const int64_t k = c.shape.intermediate;
  for (int64_t i = 0; i < c.sorted.num_active; ++i) {
    const int32_t expert = c.sorted.active[i];
    const int64_t first = c.sorted.first[expert];
    MatmulArgs args = {};
    args.rows = c.h + first * c.h_stride;
    args.row_stride = c.h_stride;
    args.row_type = c.hidden_type();
    args.num_rows = c.sorted.first[expert + 1] - first;
    args.panel_stride = panel_bytes(k, c.format);
    args.panels = c.down + expert * packed_bytes(c.shape.hidden, k, c.format) + column / kPanelColumns * args.panel_stride;
    args.num_panels = round_up(width, kPanelColumns) / kPanelColumns;
    args.format = c.format;
    args.k = k;
    args.out = block + first * width;
    args.out_stride = width * (int64_t)sizeof(float);
    args.num_columns = width;
    if (i + 1 < c.sorted.num_active) {
      args.next = args.panels + (c.sorted.active[i + 1] - expert) * packed_bytes(c.shape.hidden, k, c.format);
      prefetch_start(args.next, args);
    }
    c.table.matmul[format_kind(c.format)](&args);
  }
}

void sum_slots(const Call& c, const float* weights, int64_t column, int64_t width, const float* block,
               const float** slots, float* out) {
  const int64_t top_k = c.shape.top_k;
  for (int64_t t = 0; t < c.shape.num_tokens; ++t) {
    for (int64_t s = 0; s < top_k; ++s) {
      const int64_t row = c.sorted.row_of[t * top_k + s];
      slots[s] = row >= 0 ? block + row * width : c.constants + (-1 - row) * c.shape.hidden + column;
    }
    c.table.weighted_sum(slots, weights + t * top_k, top_k, width, out + t * c.shape.hidden + column);
  }
}

// Of one output's panel of columns: sum of squares and largest absolute number. In lanes, so that none waits.
void panel_moments(const float* row, int64_t columns, double* square, float* peak) {
  constexpr int64_t kLanes = 8;
  double sums[kLanes] = {};
  float tops[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float value = row[j + lane];
      sums[lane] += (double)value * value;
      tops[lane] = std::max(tops[lane], std::fabs(value));
    }
  }
  for (int64_t lane = 0; j < columns; ++j, ++lane) {
    sums[lane] += (double)row[j] * row[j];
    tops[lane] = std::max(tops[lane], std::fabs(row[j]));
  }
  *square = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  *peak = *std::max_element(tops, tops + kLanes);
}

// Per panel of every sorted row, to be added up when all panels are there.
struct PanelMoments {
  int64_t count;    // panels of a row
  double* squares;  // [pairs, count]
  float* peaks;
};

void add_moments(const Call& c, int64_t column, int64_t width, const float* block, const Moments& moments,
                 const PanelMoments& panels) {
  for (int64_t i = 0; i < c.sorted.num_active; ++i) {
    const int32_t expert = c.sorted.active[i];
    double* sums = moments.sums + expert * c.shape.hidden + column;
    for (int64_t r = c.sorted.first[expert]; r < c.sorted.first[expert + 1]; ++r) {
      const float* row = block + r * width;
      for (int64_t first = 0; first < width; first += kPanelColumns) {
        const int64_t at = r * panels.count + (column + first) / kPanelColumns;
        panel_moments(row + first, std::min(kPanelColumns, width - first), panels.squares + at, panels.peaks + at);
      }
      if (!moments.counted[c.sorted.token_of[r]]) continue;
      for (int64_t j = 0; j < width; ++j) sums[j] += row[j];
    }
  }
}

void finish_moments(const Call& c, const PanelMoments& panels, const Moments& moments) {
  for (int64_t p = 0; p < c.shape.num_tokens * c.shape.top_k; ++p) {
    const int64_t first = c.sorted.row_of[p] * panels.count;
    moments.squares[p] = std::accumulate(panels.squares + first, panels.squares + first + panels.count, 0.0);
    moments.peaks[p] = *std::max_element(panels.peaks + first, panels.peaks + first + panels.count);
  }
}

}  // namespace

void expert_slots(const int32_t* ids, int64_t num_tokens, int64_t top_k, const Residence& residence,
                  int64_t num_constants, int32_t* slots) {
  for (int64_t p = 0; p < num_tokens * top_k; ++p) {
    const int64_t id = ids[p], constant = id - residence.num_experts;
    if (constant >= 0 && constant < num_constants) {
      slots[p] = (int32_t)(residence.num_slots + constant);
      continue;
    }
    const bool known = id >= 0 && id < residence.num_experts;
    const int32_t slot = known ? residence.slot_of[id] : -1;
    if (slot < 0 || slot >= residence.num_slots) {
      throw KernelFault("layer " + std::to_string(residence.layer) + ": expert " + std::to_string(id) +
                        ", chosen by token " + std::to_string(p / top_k) +
                        (known ? " of the batch, is not in memory; its mask allows more than the placement holds"
                               : " of the batch, does not exist"));
    }
    slots[p] = slot;
  }
}

void fused_moe(const float* x, const int32_t* ids, const float* weights, const char* gate_up, const char* down,
               const MoeShape& shape, int32_t format, float* out, const Constants& constants,
               const Moments* moments) {
  const KernelTable& table = kernels();
  const int64_t pairs = shape.num_tokens * shape.top_k, threads = num_threads();
  Scratch scratch;
  const Sorted sorted = sort_by_expert(ids, shape, constants.count, scratch);
  Activations rows(table, x, shape.num_tokens, shape.hidden, format, scratch);
  const int64_t gate_up_panels = round_up(shape.intermediate, kTileColumns) / kTileColumns;
  const int64_t hidden_width = gate_up_panels * kTileColumns;
  const int64_t h_stride = row_bytes(hidden_width, table.hidden_rows[format_kind(format)]);
  const Call call{table,        shape, sorted, gate_up, down, format, hidden_width,
                  scratch.take<char>(pairs * h_stride), h_stride, constants.rows};

  // About eight tasks per thread. A block of an integer hidden row is written by one task: four panels.
  const int64_t unit = is_integer(format) ? kRowBlock / kTileColumns : 2;
  const int64_t wanted = sorted.num_active * gate_up_panels / (threads * 8);
  const int64_t panels = std::clamp<int64_t>(wanted / unit * unit, unit, 16);
  const int64_t panel_chunks = (gate_up_panels + panels - 1) / panels;
  SlicedStage gate_up_stage(sorted.num_active, panel_chunks);

  const int64_t width = shape.hidden / (2 * kPanelColumns) >= 3 * threads ? 2 * kPanelColumns : kPanelColumns;
  SlicedStage down_stage(1, (shape.hidden + width - 1) / width);
  float* blocks = scratch.take<float>(threads * pairs * width);
  const float** slots = scratch.take<const float*>(threads * shape.top_k);

  const int64_t watched = moments ? pairs : 0, row_panels = (shape.hidden + kPanelColumns - 1) / kPanelColumns;
  const PanelMoments partial{row_panels, scratch.take<double>(watched * row_panels),
                             scratch.take<float>(watched * row_panels)};

  run(pairs * shape.hidden * shape.intermediate * 3 >= kParallelFrom, [&](int worker) {
    rows.prepare();
    gate_up_stage.drain([&](int64_t expert, int64_t chunk) {
      const int64_t panel = chunk * panels;
      gate_up_task(call, rows, sorted.active[expert], panel, std::min(panels, gate_up_panels - panel));
    });
    gate_up_stage.wait();
    down_stage.drain([&](int64_t, int64_t chunk) {
      const int64_t column = chunk * width, columns = std::min(width, shape.hidden - column);
      float* block = blocks + worker * pairs * width;
      down_task(call, column, columns, block);
      sum_slots(call, weights, column, columns, block, slots + worker * shape.top_k, out);
      if (moments) add_moments(call, column, columns, block, *moments, partial);
    });
    down_stage.wait();
  });
  if (moments) finish_moments(call, partial, *moments);
}
