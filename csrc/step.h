// A whole step of a model in one call: what moe_runtime/layers/ says in Python, with the same operations in the same
// order, so that both give the same bits. Built once from plain descriptors (addresses and shapes); the caller keeps
// alive what they point to.
#pragma once
#include <atomic>
#include <cstdint>
#include <variant>
#include <vector>

#include "arena.h"
#include "ops.h"

// ---- Descriptors. A null address means that the model does not have the part. --------------------------------------

struct Table {             // embedding rows [rows, columns] of a plain kind
  const char* data;
  int64_t rows, columns;
  int32_t dtype;
};
struct Matrix {            // packed [n, k] per head; bias [n] or null
  const char* data;
  int64_t heads, n, k;
  int32_t format;
  const float* bias;
};
struct Norm {              // RMS norm, weight [size]
  const float* weight;
  int64_t size;
  double eps;
};
struct Rotation {          // cos and sin [positions, half]
  const float* cos;
  const float* sin;
  int64_t positions, half;
  bool interleaved;
};
struct LayerCache {        // values null: the first value_dim columns of the keys
  char* keys;
  char* values;
  CacheShape shape;
};
struct GroupedAttention {  // layers/attention.py
  Matrix inputs, output;   // inputs: queries, keys and values, stacked
  Norm query_norm, key_norm;
  bool norm_by_head;       // else over the whole projection
  double clip;             // queries, keys and values lie within +-clip; infinity for no limit
  double scale;
};
struct LatentAttention {   // layers/latent_attention.py
  Matrix inputs;           // query (or its latent), key latent and shared rotated key, stacked
  Norm query_norm;         // both null: inputs gives the queries themselves
  Matrix query_expand;
  Norm latent_norm;
  Matrix absorb, expand, output;
  double scale;
};
struct Recovery {          // layers/recovery.py; offsets and stand_ins null: none
  const float* offsets;    // [num_masks, num_experts], as ExpertMasks'
  const int32_t* stand_ins;
  Constants constants;     // which stand_ins name
};
struct Mixture {           // layers/moe.py; router null: every token visits expert 0 with weight 1
  Matrix router;
  const float* selection_bias;
  RouterRules rules;
  const uint8_t* masks;    // [num_masks, num_experts], which may change between steps; null: none
  int64_t num_masks;
  const char* gate_up;
  const char* down;
  int64_t num_experts, hidden, intermediate;
  int32_t format;
  Residence residence{};   // gate_up and down hold its num_slots experts
  Recovery recovery{};
};
struct Layer {
  Norm attention_norm;
  std::variant<GroupedAttention, LatentAttention> attention;
  LayerCache cache;
  Norm mlp_norm;
  Mixture experts;
  Mixture shared;          // gate_up null: none
};
struct Model {
  Table embedding;
  std::vector<Layer> layers;
  Norm norm;
  Matrix head;
  Rotation rotation;
};

// Tensors of moe_runtime/batch.py.
struct StepBatch {
  const int64_t* token_ids;
  const int32_t* positions;
  const int64_t* slots;
  const int32_t* sequence_rows;
  const int32_t* block_tables;
  const int64_t* logit_rows;
  const int32_t* mask_rows;  // null: no token has a mask
  int64_t num_tokens, num_sequences, max_blocks, num_logit_rows;
  RouteMeter meter;          // over all layers; the last one, which sees logit rows alone, is not in `lost`
};

// ---- The program ---------------------------------------------------------------------------------------------------

class StepProgram {
 public:
  // Throws KernelFault for shapes that do not fit each other.
  explicit StepProgram(Model model);

  // logits [num_logit_rows, vocabulary]; the caches get the keys and values of all tokens. Throws KernelFault for
  // values out of range, as the operations do, and for a second thread that comes while a step is running; a step
  // after one that failed starts clean.
  void run(const StepBatch& batch, float* logits);

 private:
  void run_layers(const StepBatch& batch, float* logits);

  const Model model_;
  Arena arena_;
  std::atomic<bool> busy_{false};
};

// ---- Its parts -----------------------------------------------------------------------------------------------------

struct StepContext {
  const StepBatch& batch;
  const Rotation& rotation;
  Arena& arena;
};

// step_checks.cpp
void check_model(const Model& model);
void check_batch(const StepBatch& batch, const Table& embedding);

// step_attention.cpp: x and out [T, hidden]
void attend(const GroupedAttention& attention, const LayerCache& cache, const StepContext& step, const float* x,
            float* out);
void attend(const LatentAttention& attention, const LayerCache& cache, const StepContext& step, const float* x,
            float* out);

inline void apply(const Matrix& m, const float* x, int64_t rows, float* out) {
  linear(x, rows, m.heads, m.k, m.data, m.n, m.format, m.bias, out);
}
// x and out may be the same rows.
inline void apply(const Norm& n, const float* x, int64_t rows, float* out) {
  rms_norm(x, nullptr, n.weight, n.eps, rows, n.size, out, nullptr);
}
