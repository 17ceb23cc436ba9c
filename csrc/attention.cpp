// Paged attention, grouped-query and latent (MLA).
//
// Work is cut twice. Rows: up to 16 (token, head) pairs that read the same key head of the same sequence form a tile,
// so that keys are loaded once for all of them. Positions: parts of 256, from position 0. Each part is a softmax of its
// own; parts are merged in order. Which rows share a tile and which thread takes a part change no bit.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "errors.h"
#include "ops.h"
#include "scratch.h"
#include "thread_pool.h"

namespace {

struct Tile {
  int64_t first_token, num_tokens, kv_head, first_head, num_heads;  // heads are query heads
  int64_t length;                                                   // positions its furthest row sees
  int64_t num_parts() const { return (length + kAttentionPart - 1) / kAttentionPart; }
};

struct Call {
  const KernelTable& table;
  const float* q;
  int64_t num_heads;
  const char* keys;
  const char* values;  // null: the first value_dim columns of the keys
  const CacheShape& cache;
  const int32_t* positions;
  const int32_t* sequence_rows;
  const int32_t* block_tables;
  int64_t max_blocks;
  float scale;
};

// Running or partial results of a tile: max[16], sum[16], out[16, value_dim].
struct State {
  float* max;
  float* sum;
  float* out;
  static int64_t size(int64_t value_dim) { return kAttentionRows * (2 + round_up(value_dim, 16)); }
  explicit State(float* memory) : max(memory), sum(memory + kAttentionRows), out(memory + 2 * kAttentionRows) {}
};

[[noreturn]] void fail(const std::string& what, int64_t index, int64_t got, int64_t limit) {
  throw KernelFault("attention: " + what + "[" + std::to_string(index) + "] = " + std::to_string(got) +
                    ", expected 0 <= value < " + std::to_string(limit));
}

void check_tables(const Call& c, int64_t num_tokens, int64_t num_sequences) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int64_t row = c.sequence_rows[t], position = c.positions[t];
    if (row < 0 || row >= num_sequences) fail("sequence_rows", t, row, num_sequences);
    if (position < 0 || position >= c.max_blocks * c.cache.block_size) {
      fail("positions", t, position, c.max_blocks * c.cache.block_size);
    }
    // The last token of a run of one sequence usually sees furthest; skip those it covers.
    if (t + 1 < num_tokens && c.sequence_rows[t + 1] == row && c.positions[t + 1] >= position) continue;
    const int32_t* blocks = c.block_tables + row * c.max_blocks;
    for (int64_t b = 0; b <= position / c.cache.block_size; ++b) {
      if (blocks[b] < 0 || blocks[b] >= c.cache.num_blocks) {
        fail("block_tables[" + std::to_string(row) + "]", b, blocks[b], c.cache.num_blocks);
      }
    }
  }
}

std::vector<Tile> make_tiles(const Call& c, int64_t num_tokens) {
  const int64_t group = c.num_heads / c.cache.kv_heads;
  const int64_t heads = std::min<int64_t>(group, kAttentionRows), tokens = kAttentionRows / heads;
  std::vector<Tile> tiles;
  for (int64_t t = 0; t < num_tokens;) {
    int64_t end = t, length = 0;
    for (; end < num_tokens && end < t + tokens && c.sequence_rows[end] == c.sequence_rows[t]; ++end) {
      length = std::max<int64_t>(length, (int64_t)c.positions[end] + 1);
    }
    for (int64_t kv = 0; kv < c.cache.kv_heads; ++kv) {
      for (int64_t h = 0; h < group; h += heads) {
        tiles.push_back({t, end - t, kv, kv * group + h, std::min(heads, group - h), length});
      }
    }
    t = end;
  }
  return tiles;
}

void compute_part(const Call& c, const Tile& tile, int64_t part, const State& result) {
  const int64_t first = part * kAttentionPart;
  const int64_t element = element_size(c.cache.dtype);
  AttentionPart a;
  a.num_rows = 0;
  a.num_keys = (int32_t)std::min<int64_t>(kAttentionPart, tile.length - first);
  for (int64_t t = tile.first_token; t < tile.first_token + tile.num_tokens; ++t) {
    const int64_t visible = std::clamp<int64_t>((int64_t)c.positions[t] + 1 - first, 0, a.num_keys);
    for (int64_t h = 0; h < tile.num_heads; ++h) {
      a.visible[a.num_rows] = (int32_t)visible;
      a.query[a.num_rows++] = c.q + (t * c.num_heads + tile.first_head + h) * c.cache.key_dim;
    }
  }
  const int32_t* blocks = c.block_tables + c.sequence_rows[tile.first_token] * c.max_blocks;
  const int64_t key_bytes = c.cache.key_dim * element, value_bytes = c.cache.value_dim * element;
  for (int64_t i = 0; i < a.num_keys;) {
    const int64_t block = blocks[(first + i) / c.cache.block_size], offset = (first + i) % c.cache.block_size;
    int64_t row = (block * c.cache.kv_heads + tile.kv_head) * c.cache.block_size + offset;
    const int64_t end = std::min<int64_t>(a.num_keys, i + c.cache.block_size - offset);
    for (; i < end; ++i, ++row) {
      a.keys[i] = c.keys + row * key_bytes;
      a.values[i] = c.values ? c.values + row * value_bytes : a.keys[i];
    }
  }
  a.cache_dtype = c.cache.dtype;
  a.key_dim = (int32_t)c.cache.key_dim;
  a.value_dim = (int32_t)c.cache.value_dim;
  a.scale = c.scale;
  a.max = result.max;
  a.sum = result.sum;
  a.out = result.out;
  c.table.attention_part(&a);
}

void clear(const State& state, int64_t rows, int64_t dim) {
  std::fill_n(state.max, rows, -INFINITY);
  std::fill_n(state.sum, rows, 0.0f);
  std::fill_n(state.out, rows * dim, 0.0f);
}

void merge(const Call& c, const State& into, const State& part, int64_t rows) {
  const int64_t dim = c.cache.value_dim;
  for (int64_t r = 0; r < rows; ++r) {
    c.table.attention_merge(into.max + r, into.sum + r, into.out + r * dim, part.max + r, part.sum + r,
                            part.out + r * dim, dim);
  }
}

void finish(const Call& c, const Tile& tile, const State& state, float* out) {
  const int64_t dim = c.cache.value_dim;
  for (int64_t r = 0; r < tile.num_tokens * tile.num_heads; ++r) {
    const int64_t token = tile.first_token + r / tile.num_heads, head = tile.first_head + r % tile.num_heads;
    c.table.attention_finish(state.sum + r, state.out + r * dim, out + (token * c.num_heads + head) * dim, dim);
  }
}

// A tile on one thread, part after part.
void whole_tile(const Call& c, const Tile& tile, float* memory, float* out) {
  const int64_t rows = tile.num_tokens * tile.num_heads;
  const State total(memory), part(memory + State::size(c.cache.value_dim));
  clear(total, rows, c.cache.value_dim);
  for (int64_t p = 0; p < tile.num_parts(); ++p) {
    compute_part(c, tile, p, part);
    merge(c, total, part, rows);
  }
  finish(c, tile, total, out);
}

// Few tiles, long contexts (decode): parts are tasks too, and a second stage merges them.
void split_tiles(const Call& c, const std::vector<Tile>& tiles, int64_t threads, Scratch& scratch, float* out) {
  const int64_t size = State::size(c.cache.value_dim);
  std::vector<int64_t> first_part(1, 0);
  for (const Tile& tile : tiles) first_part.push_back(first_part.back() + tile.num_parts());
  float* memory = scratch.take<float>((first_part.back() + threads) * size);
  Stage parts(first_part.back()), merges((int64_t)tiles.size());
  run(true, [&](int worker) {
    parts.drain([&](int64_t task) {
      const auto after = std::upper_bound(first_part.begin(), first_part.end(), task);
      const int64_t tile = after - first_part.begin() - 1;
      compute_part(c, tiles[tile], task - first_part[tile], State(memory + task * size));
    });
    parts.wait();
    merges.drain([&](int64_t i) {
      const int64_t rows = tiles[i].num_tokens * tiles[i].num_heads;
      const State total(memory + (first_part.back() + worker) * size);
      clear(total, rows, c.cache.value_dim);
      for (int64_t p = first_part[i]; p < first_part[i + 1]; ++p) merge(c, total, State(memory + p * size), rows);
      finish(c, tiles[i], total, out);
    });
    merges.wait();
  });
}

}  // namespace

void attention(const float* q, int64_t num_tokens, int64_t num_heads, const char* keys, const char* values,
               const CacheShape& cache, const int32_t* positions, const int32_t* sequence_rows,
               const int32_t* block_tables, int64_t num_sequences, int64_t max_blocks, double scale, float* out) {
  const Call call{kernels(), q, num_heads, keys, values, cache, positions, sequence_rows, block_tables, max_blocks,
                  (float)scale};
  check_tables(call, num_tokens, num_sequences);
  const std::vector<Tile> tiles = make_tiles(call, num_tokens);
  const int64_t threads = num_threads();
  Scratch scratch;
  int64_t work = 0;
  for (const Tile& tile : tiles) work += tile.length * tile.num_tokens * tile.num_heads;
  const bool parallel = work * (cache.key_dim + cache.value_dim) > (1 << 17);
  if (parallel && threads > 1 && (int64_t)tiles.size() < 4 * threads) return split_tiles(call, tiles, threads, scratch, out);

  float* memory = scratch.take<float>(threads * 2 * State::size(cache.value_dim));
  Stage stage((int64_t)tiles.size());
  run(parallel, [&](int worker) {
    // Later tiles of a prompt see more; taking them first keeps the threads even at the end.
    stage.drain([&](int64_t task) {
      whole_tile(call, tiles[tiles.size() - 1 - (size_t)task], memory + worker * 2 * State::size(cache.value_dim), out);
    });
    stage.wait();
  });
}
