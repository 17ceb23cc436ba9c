#include "attention_plan.h"

#include <algorithm>
#include <string>

#include "errors.h"

namespace {

[[noreturn]] void fail(const std::string& what, int64_t index, int64_t got, int64_t limit) {
  throw KernelFault("attention: " + what + "[" + std::to_string(index) + "] = " + std::to_string(got) +
                    ", expected 0 <= value < " + std::to_string(limit));
}

}  // namespace

void check_attention(const AttentionCall& c, int64_t num_tokens, int64_t num_sequences) {
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

AttentionPlan::AttentionPlan(const AttentionCall& c, int64_t num_tokens, int64_t run_tiles) {
  const int64_t group = c.num_heads / c.cache.kv_heads;
  const int64_t heads = std::min<int64_t>(group, kAttentionRows), tokens = kAttentionRows / heads;
  const int64_t chunks = (group + heads - 1) / heads, span = std::max<int64_t>(1, run_tiles / chunks) * tokens;
  std::vector<int64_t> first_tile;
  for (int64_t t = 0, end; t < num_tokens; t = end) {
    for (end = t + 1; end < num_tokens && end < t + span && c.sequence_rows[end] == c.sequence_rows[t];) ++end;
    for (int64_t kv = 0; kv < c.cache.kv_heads; ++kv) {
      for (int64_t first = t; first < end; first += tokens) {
        const int64_t last = std::min(end, first + tokens);
        const int64_t length = 1 + (int64_t)*std::max_element(c.positions + first, c.positions + last);
        for (int64_t h = 0; h < group; h += heads) {
          const bool fresh = (first == t && h == 0) || runs.back().num_tiles == run_tiles;
          if (fresh) {
            runs.push_back({kv, c.sequence_rows[t], nullptr, 0, 0});
            first_tile.push_back((int64_t)tiles.size());
          }
          tiles.push_back({first, last - first, kv * group + h, std::min(heads, group - h), length});
          AttentionRun& run = runs.back();
          ++run.num_tiles;
          run.length = std::max(run.length, length);
        }
      }
    }
  }
  for (size_t i = 0; i < runs.size(); ++i) runs[i].tiles = tiles.data() + first_tile[i];
}
