// The two kinds of attention layer, from normed rows to the update of the residual stream.
#include <cmath>
#include <cstring>

#include "row_tasks.h"
#include "step.h"

namespace {

// Token t's head h begins at data + t * stride + h * head_stride.
struct Heads {
  const float* data;
  int64_t stride, head_stride;
};

// Copies `width` floats per head to heads that lie `to_stride` apart, held within +-limit.
void copy_heads(const Heads& from, int64_t tokens, int64_t heads, int64_t width, float* to, int64_t to_stride,
                double limit = INFINITY) {
  const float high = (float)limit;
  for_row_chunks(tokens, heads * width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * heads; i < end * heads; ++i) {
      const float* source = from.data + i / heads * from.stride + i % heads * from.head_stride;
      float* target = to + i * to_stride;
      if (high == INFINITY) std::memcpy(target, source, (size_t)width * sizeof(float));
      else for (int64_t d = 0; d < width; ++d) target[d] = std::clamp(source[d], -high, high);  // NaN stays NaN
    }
  });
}

// The same for one head per token, where heads do not matter.
void copy_columns(const float* from, int64_t stride, int64_t tokens, int64_t width, float* to, int64_t to_stride,
                  double limit = INFINITY) {
  copy_heads({from, stride, 0}, tokens, 1, width, to, to_stride, limit);
}

void turn(const StepContext& step, float* x, int64_t heads, int64_t dim, int64_t offset) {
  const Rotation& r = step.rotation;
  rope(x, step.batch.num_tokens, heads, dim, r.cos, r.sin, r.positions, r.half, step.batch.positions, r.interleaved,
       offset);
}

void store(const StepContext& step, const CacheShape& shape, char* cache, int64_t dim, const float* rows) {
  write_cache(cache, shape.num_blocks, shape.kv_heads, shape.block_size, dim, shape.dtype, rows, step.batch.slots,
              step.batch.num_tokens);
}

// query [T, heads, key_dim] -> out [T, heads, value_dim]
void look_back(const StepContext& step, const LayerCache& cache, const float* query, int64_t heads, double scale,
               float* out) {
  const StepBatch& b = step.batch;
  attention(query, b.num_tokens, heads, cache.keys, cache.values, cache.shape, b.positions, b.sequence_rows,
            b.block_tables, b.num_sequences, b.max_blocks, scale, out);
}

}  // namespace

void attend(const GroupedAttention& a, const LayerCache& cache, const StepContext& step, const float* x, float* out) {
  Arena::Scope scope(step.arena);
  const int64_t tokens = step.batch.num_tokens, dim = cache.shape.key_dim, kv_heads = cache.shape.kv_heads;
  const int64_t width = a.output.k, kv_width = kv_heads * dim, stride = a.inputs.n;
  // 1. Queries, keys and values of these tokens. A norm of whole projections comes before the clip, one of heads after.
  float* stacked = step.arena.take<float>(tokens * stride);
  float* query = step.arena.take<float>(tokens * width);
  float* key = step.arena.take<float>(tokens * kv_width);
  float* value = step.arena.take<float>(tokens * kv_width);
  apply(a.inputs, x, tokens, stacked);
  const bool norm_first = a.query_norm.weight && !a.norm_by_head;
  const double limit = norm_first ? INFINITY : a.clip;
  copy_columns(stacked, stride, tokens, width, query, width, limit);
  copy_columns(stacked + width, stride, tokens, kv_width, key, kv_width, limit);
  copy_columns(stacked + width + kv_width, stride, tokens, kv_width, value, kv_width, a.clip);
  if (a.query_norm.weight) {
    apply(a.query_norm, query, tokens * width / a.query_norm.size, query);
    apply(a.key_norm, key, tokens * kv_width / a.key_norm.size, key);
  }
  if (norm_first && a.clip < INFINITY) {
    copy_columns(query, width, tokens, width, query, width, a.clip);
    copy_columns(key, kv_width, tokens, kv_width, key, kv_width, a.clip);
  }
  // 2. Turned by their positions.
  turn(step, query, width / dim, dim, 0);
  turn(step, key, kv_heads, dim, 0);
  // 3. Into the cache, then attention over it: a token sees itself and everything before it.
  store(step, cache.shape, cache.keys, dim, key);
  store(step, cache.shape, cache.values, dim, value);
  float* mixed = stacked;  // free by now, and wider than needed
  look_back(step, cache, query, width / dim, a.scale, mixed);
  apply(a.output, mixed, tokens, out);
}

void attend(const LatentAttention& a, const LayerCache& cache, const StepContext& step, const float* x, float* out) {
  Arena::Scope scope(step.arena);
  const int64_t tokens = step.batch.num_tokens, heads = a.absorb.heads, stride = a.inputs.n;
  const int64_t key_dim = cache.shape.key_dim, rank = cache.shape.value_dim, turned = key_dim - rank;
  const int64_t plain = a.absorb.k, head_dim = plain + turned, query_columns = stride - key_dim;
  // 1. Queries, and the one latent that stands for all heads' keys and values.
  float* stacked = step.arena.take<float>(tokens * stride);
  apply(a.inputs, x, tokens, stacked);
  Heads query{stacked, stride, head_dim};
  if (a.query_expand.data) {
    float* small = step.arena.take<float>(tokens * query_columns);
    float* large = step.arena.take<float>(tokens * heads * head_dim);
    copy_columns(stacked, stride, tokens, query_columns, small, query_columns);
    apply(a.query_norm, small, tokens, small);
    apply(a.query_expand, small, tokens, large);
    query = {large, heads * head_dim, head_dim};
  }
  float* latent = step.arena.take<float>(tokens * rank);
  float* key = step.arena.take<float>(tokens * key_dim);
  copy_columns(stacked + query_columns, stride, tokens, rank, latent, rank);
  apply(a.latent_norm, latent, tokens, latent);
  copy_columns(latent, rank, tokens, rank, key, key_dim);
  copy_columns(stacked + query_columns + rank, stride, tokens, turned, key + rank, key_dim);
  // 2. The query in latent space; its last columns, like the key's, carry the position.
  float* unabsorbed = step.arena.take<float>(tokens * heads * plain);
  float* absorbed = step.arena.take<float>(tokens * heads * rank);
  float* wide = step.arena.take<float>(tokens * heads * key_dim);
  copy_heads(query, tokens, heads, plain, unabsorbed, plain);
  apply(a.absorb, unabsorbed, tokens, absorbed);
  copy_heads({absorbed, heads * rank, rank}, tokens, heads, rank, wide, key_dim);
  copy_heads({query.data + plain, query.stride, query.head_stride}, tokens, heads, turned, wide + rank, key_dim);
  turn(step, wide, heads, key_dim, rank);
  turn(step, key, 1, key_dim, rank);
  // 3. Into the cache, attention over it, and back to each head's values.
  store(step, cache.shape, cache.keys, key_dim, key);
  float* mixed = absorbed;
  look_back(step, cache, wide, heads, a.scale, mixed);
  float* values = step.arena.take<float>(tokens * heads * a.expand.n);
  apply(a.expand, mixed, tokens, values);
  apply(a.output, values, tokens, out);
}
