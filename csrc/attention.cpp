// Paged attention, grouped-query and latent (MLA).
//
// Work is cut twice. Rows: up to 16 (token, head) pairs that read the same key head of the same sequence form a tile,
// and up to 4 such tiles a run, so that keys and values are fetched once for all of them. Positions: parts of 256, from
// position 0. Each part is a softmax of its own; parts are merged in order. Which rows share a tile or a run and which
// thread takes a part change no bit.
#include <algorithm>
#include <cmath>
#include <vector>

#include "attention_plan.h"
#include "cpu_features.h"
#include "scratch.h"
#include "thread_pool.h"

namespace {

// Running or partial results of a tile: max[16], sum[16], out[16, value_dim].
struct State {
  float* max;
  float* sum;
  float* out;
  static int64_t size(int64_t value_dim) { return kAttentionRows * (2 + round_up(value_dim, 16)); }
  explicit State(float* memory) : max(memory), sum(memory + kAttentionRows), out(memory + 2 * kAttentionRows) {}
};

// One worker's memory: queries as the kernel reads them, rows of an int8 cache made wide, and a part's result.
struct Workspace {
  char *queries = nullptr, *keys = nullptr, *values = nullptr;
  float* part = nullptr;

  Workspace(const AttentionCall& c, Scratch& scratch) : part(scratch.take<float>(State::size(c.cache.value_dim))) {
    if (c.query_dtype == kBFloat16) queries = scratch.take<char>(kRunTiles * kAttentionRows * c.query_bytes());
    if (c.cache.dtype != kInt8) return;
    keys = scratch.take<char>(kAttentionPart * c.cache.key_dim * element_size(c.row_dtype));
    if (c.values) values = scratch.take<char>(kAttentionPart * c.cache.value_dim * element_size(c.row_dtype));
  }
};

std::vector<Workspace> workspaces(const AttentionCall& c, int64_t threads, Scratch& scratch) {
  std::vector<Workspace> spaces;
  for (int64_t i = 0; i < threads; ++i) spaces.emplace_back(c, scratch);
  return spaces;
}

// Rows of an int8 cache -> wide rows in `space`; they are asked for ahead, as no stream leads from block to block.
void widen_rows(const AttentionCall& c, const char** rows, int64_t count, int64_t dim, char* space) {
  const int64_t bytes = cache_row_bytes(dim, kInt8), wide = dim * element_size(c.row_dtype);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t b = 0; i + 16 < count && b < bytes; b += 64) __builtin_prefetch(rows[i + 16] + b);
    c.table.dequantize_row(rows[i], space + i * wide, dim);
    rows[i] = space + i * wide;
  }
}

// Where a tile's queries are: rounded into the workspace if the kernel wants bf16, else the caller's own.
void locate_queries(const AttentionCall& c, const AttentionRun& run, Workspace& space, const char** queries) {
  for (int64_t i = 0; i < run.num_tiles; ++i) {
    const AttentionTile& tile = run.tiles[i];
    for (int64_t r = 0; r < tile.rows(); ++r) {
      const int64_t token = tile.first_token + r / tile.num_heads, head = tile.first_head + r % tile.num_heads;
      const float* query = c.q + (token * c.num_heads + head) * c.cache.key_dim;
      const int64_t place = i * kAttentionRows + r;
      if (space.queries) {
        char* copy = space.queries + place * c.query_bytes();
        c.table.convert(query, copy, c.cache.key_dim, kBFloat16);
        queries[place] = copy;
      } else {
        queries[place] = reinterpret_cast<const char*>(query);
      }
    }
  }
}

// Addresses of a part's keys and values.
void locate_rows(const AttentionCall& c, const AttentionRun& run, int64_t part, Workspace& space, AttentionPart& a) {
  const int64_t first = part * kAttentionPart, block_size = c.cache.block_size;
  const int32_t* blocks = c.block_tables + run.sequence_row * c.max_blocks;
  const int64_t key_bytes = cache_row_bytes(c.cache.key_dim, c.cache.dtype);
  const int64_t value_bytes = cache_row_bytes(c.cache.value_dim, c.cache.dtype);
  a.num_keys = (int32_t)std::min<int64_t>(kAttentionPart, run.length - first);
  for (int64_t i = 0; i < a.num_keys;) {
    const int64_t block = blocks[(first + i) / block_size], offset = (first + i) % block_size;
    int64_t row = (block * c.cache.kv_heads + run.kv_head) * block_size + offset;
    for (int64_t end = std::min<int64_t>(a.num_keys, i + block_size - offset); i < end; ++i, ++row) {
      a.keys[i] = c.keys + row * key_bytes;
      a.values[i] = c.values ? c.values + row * value_bytes : a.keys[i];
    }
  }
  a.cold = true;
  if (c.cache.dtype != kInt8) return;
  widen_rows(c, a.keys, a.num_keys, c.cache.key_dim, space.keys);
  if (c.values) widen_rows(c, a.values, a.num_keys, c.cache.value_dim, space.values);
  else std::copy_n(a.keys, a.num_keys, a.values);
  a.cold = false;
}

// One part of one tile; `a` has the part's keys and values, and how many of them the run sees.
void compute_tile(const AttentionCall& c, const AttentionTile& tile, int64_t part, const char* const* queries,
                  AttentionPart& a, const State& result) {
  const int64_t first = part * kAttentionPart;
  const int32_t run_keys = a.num_keys;
  a.num_keys = (int32_t)std::min<int64_t>(run_keys, tile.length - first);
  a.num_rows = (int32_t)tile.rows();
  for (int64_t r = 0; r < tile.rows(); ++r) {
    const int64_t seen = (int64_t)c.positions[tile.first_token + r / tile.num_heads] + 1 - first;
    a.visible[r] = (int32_t)std::clamp<int64_t>(seen, 0, a.num_keys);
    a.query[r] = queries[r];
  }
  a.max = result.max;
  a.sum = result.sum;
  a.out = result.out;
  c.table.attention_part(&a);
  a.num_keys = run_keys;
  a.cold = false;
}

AttentionPart new_part(const AttentionCall& c) {
  AttentionPart a;
  a.row_dtype = c.row_dtype;
  a.key_dim = (int32_t)c.cache.key_dim;
  a.value_dim = (int32_t)c.cache.value_dim;
  a.scale = c.scale;
  return a;
}

void clear(const State& state, int64_t rows, int64_t dim) {
  std::fill_n(state.max, rows, -INFINITY);
  std::fill_n(state.sum, rows, 0.0f);
  std::fill_n(state.out, rows * dim, 0.0f);
}

void merge(const AttentionCall& c, const State& into, const State& part, int64_t rows) {
  const int64_t dim = c.cache.value_dim;
  for (int64_t r = 0; r < rows; ++r) {
    c.table.attention_merge(into.max + r, into.sum + r, into.out + r * dim, part.max + r, part.sum + r,
                            part.out + r * dim, dim);
  }
}

void finish(const AttentionCall& c, const AttentionTile& tile, const State& state, float* out) {
  const int64_t dim = c.cache.value_dim;
  for (int64_t r = 0; r < tile.num_tokens * tile.num_heads; ++r) {
    const int64_t token = tile.first_token + r / tile.num_heads, head = tile.first_head + r % tile.num_heads;
    c.table.attention_finish(state.sum + r, state.out + r * dim, out + (token * c.num_heads + head) * dim, dim);
  }
}

// A run on one thread, part after part. `totals` has a State for each tile.
void whole_run(const AttentionCall& c, const AttentionRun& run, Workspace& space, float* totals, float* out) {
  const int64_t size = State::size(c.cache.value_dim);
  const char* queries[kRunTiles * kAttentionRows];
  locate_queries(c, run, space, queries);
  for (int64_t i = 0; i < run.num_tiles; ++i) clear(State(totals + i * size), run.tiles[i].rows(), c.cache.value_dim);
  AttentionPart a = new_part(c);
  const State part(space.part);
  for (int64_t p = 0; p < run.num_parts(); ++p) {
    locate_rows(c, run, p, space, a);
    for (int64_t i = 0; i < run.num_tiles; ++i) {
      const AttentionTile& tile = run.tiles[i];
      if (tile.length <= p * kAttentionPart) continue;
      compute_tile(c, tile, p, queries + i * kAttentionRows, a, part);
      merge(c, State(totals + i * size), part, tile.rows());
    }
  }
  for (int64_t i = 0; i < run.num_tiles; ++i) finish(c, run.tiles[i], State(totals + i * size), out);
}

// Few tiles, long contexts (decode): parts are tasks too, and a second stage merges them. A run has one tile here.
void split_runs(const AttentionCall& c, const AttentionPlan& plan, int64_t threads, Scratch& scratch, float* out) {
  const int64_t size = State::size(c.cache.value_dim);
  std::vector<int64_t> first_part(1, 0);
  for (const AttentionRun& run : plan.runs) first_part.push_back(first_part.back() + run.num_parts());
  float* memory = scratch.take<float>(first_part.back() * size);
  std::vector<Workspace> spaces = workspaces(c, threads, scratch);
  Stage parts(first_part.back()), merges((int64_t)plan.runs.size());
  run(true, [&](int worker) {
    parts.drain([&](int64_t task) {
      const auto after = std::upper_bound(first_part.begin(), first_part.end(), task);
      const int64_t i = after - first_part.begin() - 1;
      const char* queries[kAttentionRows];
      AttentionPart a = new_part(c);
      locate_queries(c, plan.runs[i], spaces[worker], queries);
      locate_rows(c, plan.runs[i], task - first_part[i], spaces[worker], a);
      compute_tile(c, *plan.runs[i].tiles, task - first_part[i], queries, a, State(memory + task * size));
    });
    parts.wait();
    merges.drain([&](int64_t i) {
      const AttentionTile& tile = *plan.runs[i].tiles;
      const State total(spaces[worker].part);
      clear(total, tile.rows(), c.cache.value_dim);
      for (int64_t p = first_part[i]; p < first_part[i + 1]; ++p) merge(c, total, State(memory + p * size), tile.rows());
      finish(c, tile, total, out);
    });
    merges.wait();
  });
}

}  // namespace

void attention(const float* q, int64_t num_tokens, int64_t num_heads, const char* keys, const char* values,
               const CacheShape& cache, const int32_t* positions, const int32_t* sequence_rows,
               const int32_t* block_tables, int64_t num_sequences, int64_t max_blocks, double scale, float* out) {
  const KernelTable& table = kernels();
  const int32_t row_dtype = cache.dtype == kInt8 ? table.attention_query : cache.dtype;
  const int32_t query_dtype = row_dtype == kBFloat16 ? table.attention_query : (int32_t)kFloat32;
  const AttentionCall call{table, q, num_heads, keys, values, cache, row_dtype, query_dtype, positions, sequence_rows,
                           block_tables, max_blocks, (float)scale};
  check_attention(call, num_tokens, num_sequences);
  const int64_t threads = num_threads();
  Scratch scratch;
  AttentionPlan plan(call, num_tokens, kRunTiles);
  int64_t work = 0;
  for (const AttentionTile& tile : plan.tiles) work += tile.length * tile.rows();
  const bool parallel = threads > 1 && work * (cache.key_dim + cache.value_dim) > (1 << 17);
  if (parallel && (int64_t)plan.runs.size() < 4 * threads) plan = AttentionPlan(call, num_tokens, 1);
  if (parallel && (int64_t)plan.runs.size() < 4 * threads) return split_runs(call, plan, threads, scratch, out);
  const int64_t size = kRunTiles * State::size(cache.value_dim);
  float* totals = scratch.take<float>(threads * size);
  std::vector<Workspace> spaces = workspaces(call, threads, scratch);
  Stage stage((int64_t)plan.runs.size());
  run(parallel, [&](int worker) {
    // Later runs of a prompt see more; taking them first keeps the threads even at the end.
    stage.drain([&](int64_t task) {
      const AttentionRun& next = plan.runs[plan.runs.size() - 1 - (size_t)task];
      whole_run(call, next, spaces[worker], totals + worker * size, out);
    });
    stage.wait();
  });
}
