// Paged attention over caches that write_cache filled, against loops over doubles.
#include <algorithm>

#include "cache_layout.h"
#include "check.h"

namespace {

struct Case {
  int64_t heads, kv_heads, key_dim, value_dim;
  bool latent;  // values are the first columns of the keys
  int64_t block_size;
  std::vector<int64_t> lengths, new_tokens;  // per sequence
};

void quantise(float* x, int64_t count) {
  float top = 0;
  for (int64_t i = 0; i < count; ++i) top = std::max(top, std::fabs(x[i]));
  for (int64_t i = 0; i < count && top > 0; ++i) x[i] = std::nearbyintf(x[i] * (127 / top)) * (top / 127);
}

// The cache of one side, its blocks handed out in a scrambled order, and what was written.
struct Side {
  Buffer<char> cache;
  Buffer<float> written;  // [token of all sequences, kv_heads, dim], as the cache's type holds it

  Side(const Case& c, int64_t dim, int32_t dtype, int64_t num_blocks, const Buffer<int64_t>& slots, Random& random)
      : cache(num_blocks * c.kv_heads * c.block_size * cache_row_bytes(dim, dtype)),
        written(normals(random, slots.size() * c.kv_heads * dim)) {
    std::memset(cache.data(), 0xff, (size_t)cache.size());  // NaN where nothing is written
    write_cache(cache.data(), num_blocks, c.kv_heads, c.block_size, dim, dtype, written.data(), slots.data(), slots.size());
    for (int64_t i = 0; dtype == kBFloat16 && i < written.size(); ++i) written[i] = from_bfloat16(to_bfloat16(written[i]));
    for (int64_t i = 0; dtype == kInt8 && i < written.size(); i += dim) {
      for (int64_t d = 0; d < dim; d += kScaleGroup) quantise(&written[i + d], std::min(kScaleGroup, dim - d));
    }
  }
};

// One head of one token: softmax over the first `visible` tokens of a sequence that begins at row `first`.
void expect_head(const Case& c, const Side& keys, const Side& values, const float* q, int64_t kv_head, int64_t first,
                 int64_t visible, double scale, double tolerance, const float* got) {
  std::vector<double> scores, out((size_t)c.value_dim);
  double top = -INFINITY, sum = 0;
  for (int64_t t = 0; t < visible; ++t) {
    const float* key = keys.written.data() + ((first + t) * c.kv_heads + kv_head) * c.key_dim;
    double score = 0;
    for (int64_t d = 0; d < c.key_dim; ++d) score += (double)q[d] * key[d];
    scores.push_back(score * scale);
    top = std::max(top, scores.back());
  }
  const int64_t width = c.latent ? c.key_dim : c.value_dim;
  for (int64_t t = 0; t < visible; ++t) {
    const double p = std::exp(scores[(size_t)t] - top);
    const float* value = values.written.data() + ((first + t) * c.kv_heads + kv_head) * width;
    for (int64_t d = 0; d < c.value_dim; ++d) out[(size_t)d] += p * value[d];
    sum += p;
  }
  for (int64_t d = 0; d < c.value_dim; ++d) {
    if (!(std::fabs(got[d] - out[(size_t)d] / sum) <= tolerance)) fail("attention", got[d], out[(size_t)d] / sum);
  }
}

struct Tables {
  int64_t num_blocks = 0, max_blocks = 0;
  std::vector<int32_t> tables;               // [sequences, max_blocks], -1 where unused
  std::vector<int64_t> slots, first_row;     // of every token; of every sequence

  Tables(const Case& c, Random& random) {
    for (const int64_t length : c.lengths) {
      const int64_t blocks = (length + c.block_size - 1) / c.block_size;
      max_blocks = std::max(max_blocks, blocks);
      num_blocks += blocks;
    }
    std::vector<int32_t> order((size_t)num_blocks);
    for (size_t i = 0; i < order.size(); ++i) order[i] = (int32_t)i;
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
    tables.assign(c.lengths.size() * (size_t)max_blocks, -1);
    size_t next = 0;
    for (size_t s = 0; s < c.lengths.size(); ++s) {
      first_row.push_back((int64_t)slots.size());
      int32_t* row = tables.data() + s * (size_t)max_blocks;
      for (int64_t t = 0; t < c.lengths[s]; ++t) {
        if (t % c.block_size == 0) row[t / c.block_size] = order[next++];
        slots.push_back(row[t / c.block_size] * c.block_size + t % c.block_size);
      }
    }
  }
};

template <class T>
Buffer<T> exact(const std::vector<T>& values) {
  Buffer<T> copy((int64_t)values.size());
  std::copy(values.begin(), values.end(), copy.data());
  return copy;
}

void one_case(const Case& c, int32_t dtype, Random& random, Outputs& outputs) {
  const Tables t(c, random);
  const Buffer<int64_t> slots = exact(t.slots);
  const Side keys(c, c.key_dim, dtype, t.num_blocks, slots, random);
  const Side values(c, c.latent ? 1 : c.value_dim, dtype, t.num_blocks, slots, random);
  std::vector<int32_t> positions, rows;
  for (size_t s = 0; s < c.lengths.size(); ++s) {
    for (int64_t i = c.lengths[s] - c.new_tokens[s]; i < c.lengths[s]; ++i) {
      positions.push_back((int32_t)i);
      rows.push_back((int32_t)s);
    }
  }
  const int64_t tokens = (int64_t)positions.size();
  const Buffer<float> q = normals(random, tokens * c.heads * c.key_dim);
  Buffer<float> out(tokens * c.heads * c.value_dim);
  const double scale = 1 / std::sqrt((double)c.key_dim);
  const CacheShape shape{t.num_blocks, c.kv_heads, c.block_size, c.key_dim, c.value_dim, dtype};
  attention(q.data(), tokens, c.heads, keys.cache.data(), c.latent ? nullptr : values.cache.data(), shape,
            exact(positions).data(), exact(rows).data(), exact(t.tables).data(), (int64_t)c.lengths.size(), t.max_blocks,
            scale, out.data());
  outputs.keep(out);
  for (int64_t i = 0; outputs.naive && i < tokens * c.heads; ++i) {
    const int64_t token = i / c.heads, kv_head = i % c.heads / (c.heads / c.kv_heads);
    expect_head(c, keys, c.latent ? keys : values, q.data() + i * c.key_dim, kv_head, t.first_row[(size_t)rows[(size_t)token]],
                positions[(size_t)token] + 1, scale, dtype == kFloat32 ? 1e-4 : 0.03, out.data() + i * c.value_dim);
  }
}

}  // namespace

void check_attention(Outputs& outputs) {
  Random random(4);
  const Case cases[] = {
      {4, 2, 16, 16, false, 8, {1}, {1}},
      {8, 1, 24, 20, false, 16, {37, 5, 300}, {1, 5, 1}},
      {5, 5, 33, 7, false, 4, {19, 20}, {19, 3}},
      {32, 2, 64, 64, false, 16, {700}, {1}},   // 16 heads a tile, parts split over threads
      {20, 1, 72, 64, true, 16, {290, 31}, {2, 31}},
      {3, 3, 16, 16, false, 1, {258}, {258}},
  };
  for (const int32_t dtype : {kFloat32, kBFloat16, kInt8}) {
    for (const Case& c : cases) one_case(c, dtype, random, outputs);
  }
}
