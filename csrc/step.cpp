#include "step.h"

#include <cstring>

#include "errors.h"
#include "row_tasks.h"

namespace {

float widen_half(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ff;
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24
    const float value = (float)fraction * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0xffu : exponent + 112) << 23 | fraction << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void widen_row(const char* row, int64_t count, int32_t dtype, float* out) {
  if (dtype == kFloat32) {
    std::memcpy(out, row, (size_t)count * sizeof(float));
    return;
  }
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(row);
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == kBFloat16) {
      const uint32_t bits = (uint32_t)halves[i] << 16;
      std::memcpy(out + i, &bits, sizeof bits);
    } else {
      out[i] = widen_half(halves[i]);
    }
  }
}

void embed(const Table& table, const int64_t* token_ids, int64_t num_tokens, float* out) {
  const int64_t row_bytes = table.columns * element_size(table.dtype);
  for_row_chunks(num_tokens, table.columns, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      widen_row(table.data + token_ids[t] * row_bytes, table.columns, table.dtype, out + t * table.columns);
    }
  });
}

// Rows rows[0] < rows[1] < ... of x [*, size], moved to its front.
void keep_rows(float* x, int64_t size, const int64_t* rows, int64_t num_rows) {
  for (int64_t r = 0; r < num_rows; ++r) {
    if (rows[r] != r) std::memcpy(x + r * size, x + rows[r] * size, (size_t)size * sizeof(float));
  }
}

void add(const float* x, int64_t rows, int64_t size, float* total) {
  for_row_chunks(rows, size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * size; i < end * size; ++i) total[i] += x[i];
  });
}

struct Fence {
  const int32_t* mask_rows;  // of the rows that are there
  RouteMeter meter;
};

// x and out [rows, hidden].
void mix(const Mixture& m, const Fence& fence, Arena& arena, const float* x, int64_t rows, float* out) {
  Arena::Scope scope(arena);
  const int64_t top_k = m.rules.top_k;
  int32_t* ids = arena.take<int32_t>(rows * top_k);
  float* weights = arena.take<float>(rows * top_k);
  if (m.router.data) {
    float* logits = arena.take<float>(rows * m.num_experts);
    apply(m.router, x, rows, logits);
    const ExpertMasks masks{m.masks, m.num_masks, m.masks ? fence.mask_rows : nullptr, m.recovery.offsets,
                            m.recovery.stand_ins};
    route(logits, rows, m.num_experts, m.selection_bias, m.rules, masks, fence.meter, ids, weights);
  } else {
    std::fill_n(ids, rows, 0);
    std::fill_n(weights, rows, 1.0f);
  }
  const Residence& residence = m.residence;
  if (residence.slot_of) expert_slots(ids, rows, top_k, residence, m.recovery.constants.count, ids);
  const int64_t packed = residence.slot_of ? residence.num_slots : m.num_experts;
  fused_moe(x, ids, weights, m.gate_up, m.down, {rows, top_k, m.hidden, m.intermediate, packed}, m.format, out,
            m.recovery.constants);
}

// After the rows without logits have gone.
Fence last_fence(const StepBatch& batch, Arena& arena) {
  if (!batch.mask_rows) return {};
  int32_t* rows = arena.take<int32_t>(batch.num_logit_rows);
  for (int64_t r = 0; r < batch.num_logit_rows; ++r) rows[r] = batch.mask_rows[batch.logit_rows[r]];
  return {rows, {nullptr, batch.meter.outside}};
}

struct Leave {
  std::atomic<bool>& busy;
  ~Leave() { busy.store(false, std::memory_order_release); }
};

}  // namespace

StepProgram::StepProgram(Model model) : model_(std::move(model)) { check_model(model_); }

void StepProgram::run(const StepBatch& batch, float* logits) {
  if (busy_.exchange(true, std::memory_order_acquire)) {
    throw KernelFault("step: another thread is running a step over the same cache");
  }
  const Leave leave{busy_};
  check_batch(batch, model_.embedding);
  arena_.reset();
  run_layers(batch, logits);
}

void StepProgram::run_layers(const StepBatch& batch, float* logits) {
  const StepContext step{batch, model_.rotation, arena_};
  const int64_t hidden = model_.embedding.columns;
  int64_t rows = batch.num_tokens;
  Fence fence{batch.mask_rows, batch.meter};
  float* residual = arena_.take<float>(rows * hidden);
  float* normed = arena_.take<float>(rows * hidden);
  float* update = arena_.take<float>(rows * hidden);
  const auto add_norm = [&](const Norm& n) {
    rms_norm(update, residual, n.weight, n.eps, rows, n.size, normed, residual);
  };
  // 1. Tokens to vectors; the residual stream is float32 from here on.
  embed(model_.embedding, batch.token_ids, rows, residual);
  for (const Layer& layer : model_.layers) {
    // 2. Each token gathers from its past.
    if (&layer == &model_.layers.front()) apply(layer.attention_norm, residual, rows, normed);
    else add_norm(layer.attention_norm);
    std::visit([&](const auto& attention) { attend(attention, layer.cache, step, normed, update); }, layer.attention);
    // 3. After the last layer's attention only the rows we want logits for still matter.
    if (&layer == &model_.layers.back()) {
      rows = batch.num_logit_rows;
      keep_rows(update, hidden, batch.logit_rows, rows);
      keep_rows(residual, hidden, batch.logit_rows, rows);
      if (rows == 0) return;
      fence = last_fence(batch, arena_);
    }
    // 4. Each token on its own passes through its experts, and through the one that everyone visits.
    add_norm(layer.mlp_norm);
    mix(layer.experts, fence, arena_, normed, rows, update);
    if (layer.shared.gate_up) {
      Arena::Scope scope(arena_);
      float* shared = arena_.take<float>(rows * hidden);
      mix(layer.shared, {}, arena_, normed, rows, shared);
      add(shared, rows, hidden, update);
    }
  }
  // 5. Vectors to logits.
  add_norm(model_.norm);
  apply(model_.head, normed, rows, logits);
}
