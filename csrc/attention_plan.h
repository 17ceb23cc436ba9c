// What one attention call is asked, and how its rows are cut into tiles and runs (see attention.cpp).
#pragma once
#include <cstdint>
#include <vector>

#include "kernel_table.h"
#include "ops.h"

struct AttentionTile {
  int64_t first_token, num_tokens, first_head, num_heads;  // heads are query heads
  int64_t length;                                          // positions its furthest row sees
  int64_t rows() const { return num_tokens * num_heads; }
};

// Consecutive tiles of one sequence and key head.
struct AttentionRun {
  int64_t kv_head, sequence_row;
  const AttentionTile* tiles;
  int64_t num_tiles, length;
  int64_t num_parts() const { return (length + kAttentionPart - 1) / kAttentionPart; }
};

struct AttentionCall {
  const KernelTable& table;
  const float* q;
  int64_t num_heads;
  const char* keys;
  const char* values;  // null: the first value_dim columns of the keys
  const CacheShape& cache;
  int32_t row_dtype;    // of keys and values as the kernel reads them
  int32_t query_dtype;  // and of queries
  const int32_t* positions;
  const int32_t* sequence_rows;
  const int32_t* block_tables;
  int64_t max_blocks;
  float scale;
  int64_t query_bytes() const { return cache.key_dim * element_size(query_dtype); }
};

// Most tiles of a run.
constexpr int64_t kRunTiles = 4;

// Refuses, with KernelFault, indices that lead outside the cache or the block tables.
void check_attention(const AttentionCall& call, int64_t num_tokens, int64_t num_sequences);

// The tiles of all tokens, run after run. A run ends after `run_tiles` tiles, or where its sequence or key head does.
struct AttentionPlan {
  AttentionPlan(const AttentionCall& call, int64_t num_tokens, int64_t run_tiles);
  AttentionPlan(AttentionPlan&&) = default;
  AttentionPlan& operator=(AttentionPlan&&) = default;
  std::vector<AttentionTile> tiles;
  std::vector<AttentionRun> runs;
};
