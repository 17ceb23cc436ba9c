// Shapes are compared once, when a program is built: after that a wrong one would be a wild pointer.
#include <string>

#include "errors.h"
#include "step.h"

namespace {

struct Checker {
  std::string where;

  void equal(const char* what, int64_t got, int64_t expected) const {
    if (got != expected) {
      throw KernelFault("step: " + where + what + " is " + std::to_string(got) + ", expected " +
                        std::to_string(expected));
    }
  }
  void holds(const char* what, bool condition) const {
    if (!condition) throw KernelFault("step: " + where + what);
  }
  void matrix(const char* what, const Matrix& m, int64_t heads, int64_t n, int64_t k) const {
    const std::string name = what;
    equal((name + ".heads").c_str(), m.heads, heads);
    equal((name + ".n").c_str(), m.n, n);
    equal((name + ".k").c_str(), m.k, k);
  }

  void attention(const GroupedAttention& a, const CacheShape& cache, const Rotation& rotation, int64_t hidden) const {
    const int64_t dim = cache.key_dim, kv_width = cache.kv_heads * dim;
    equal("the cache's value_dim", cache.value_dim, dim);
    holds("heads do not fit the cache's", kv_width > 0 && a.output.k % kv_width == 0);
    matrix("inputs", a.inputs, 1, a.output.k + 2 * kv_width, hidden);
    matrix("output", a.output, 1, hidden, a.output.k);
    holds("one of two norms is missing", !a.query_norm.weight == !a.key_norm.weight);
    if (a.query_norm.weight) {
      equal("query_norm", a.query_norm.size, a.norm_by_head ? dim : a.output.k);
      equal("key_norm", a.key_norm.size, a.norm_by_head ? dim : kv_width);
    }
    holds("the clip is not a positive number", a.clip > 0);
    holds("more dimensions are rotated than a head has", 2 * rotation.half <= dim);
  }

  void attention(const LatentAttention& a, const CacheShape& cache, const Rotation& rotation, int64_t hidden) const {
    const int64_t rank = cache.value_dim, turned = cache.key_dim - rank, heads = a.absorb.heads;
    const int64_t width = heads * (a.absorb.k + turned);
    equal("the cache's kv_heads", cache.kv_heads, 1);
    equal("the rotated part of the key", turned, 2 * rotation.half);
    matrix("absorb", a.absorb, heads, rank, a.absorb.k);
    matrix("expand", a.expand, heads, a.expand.n, rank);
    matrix("output", a.output, 1, hidden, heads * a.expand.n);
    equal("latent_norm", a.latent_norm.size, rank);
    const int64_t query = a.query_expand.data ? a.query_norm.size : width;
    matrix("inputs", a.inputs, 1, query + cache.key_dim, hidden);
    if (a.query_expand.data) matrix("query_expand", a.query_expand, 1, width, query);
  }

  void mixture(const Mixture& m, int64_t hidden) const {
    equal("the experts' hidden", m.hidden, hidden);
    holds("there is no expert", m.num_experts > 0);
    if (m.router.data) matrix("router", m.router, 1, m.num_experts, hidden);
    else equal("top_k without a router", m.rules.top_k, 1);
    if (m.residence.slot_of) equal("the residence's num_experts", m.residence.num_experts, m.num_experts);
    const Recovery& recovery = m.recovery;
    holds("one of offsets and stand-ins is missing", !recovery.offsets == !recovery.stand_ins);
    holds("there are stand-ins without masks", m.masks || !recovery.stand_ins);
    holds("there are constants without stand-ins", recovery.stand_ins || recovery.constants.count == 0);
  }
};

}  // namespace

void check_model(const Model& model) {
  const int64_t hidden = model.embedding.columns;
  Checker{""}.holds("a model has at least one layer", !model.layers.empty());
  for (size_t i = 0; i < model.layers.size(); ++i) {
    const Layer& layer = model.layers[i];
    const Checker check{"layer " + std::to_string(i) + ": "};
    check.equal("attention_norm", layer.attention_norm.size, hidden);
    check.equal("mlp_norm", layer.mlp_norm.size, hidden);
    std::visit([&](const auto& a) { check.attention(a, layer.cache.shape, model.rotation, hidden); }, layer.attention);
    check.equal("caches of their own for values", layer.cache.values != nullptr,
                std::holds_alternative<GroupedAttention>(layer.attention));
    check.mixture(layer.experts, hidden);
    if (layer.shared.gate_up) check.mixture(layer.shared, hidden);
  }
  const Checker check{"the head: "};
  check.equal("norm", model.norm.size, hidden);
  check.matrix("matrix", model.head, 1, model.head.n, hidden);
}

void check_batch(const StepBatch& batch, const Table& embedding) {
  if (batch.num_tokens < 1) throw KernelFault("step: the batch has no tokens, expected at least 1");
  for (int64_t t = 0; t < batch.num_tokens; ++t) {
    if (batch.token_ids[t] < 0 || batch.token_ids[t] >= embedding.rows) {
      throw KernelFault("step: token_ids[" + std::to_string(t) + "] = " + std::to_string(batch.token_ids[t]) +
                        ", expected 0 <= id < " + std::to_string(embedding.rows));
    }
  }
  for (int64_t r = 0; r < batch.num_logit_rows; ++r) {
    const int64_t row = batch.logit_rows[r], above = r ? batch.logit_rows[r - 1] : -1;
    if (row <= above || row >= batch.num_tokens) {
      throw KernelFault("step: logit_rows[" + std::to_string(r) + "] = " + std::to_string(row) +
                        ", expected ascending rows below " + std::to_string(batch.num_tokens));
    }
  }
}
