// A whole step of a model with one layer of each kind of attention. What it must equal is tested in Python; here it is
// memory, threads and bits that are watched.
#include "step.h"

#include <deque>

#include "check.h"
#include "errors.h"

namespace {

constexpr int64_t kHidden = 64, kVocabulary = 40, kBlocks = 12, kBlockSize = 8, kExperts = 5, kPositions = 64;

// Owns what a Model points to; deques keep addresses.
struct Parts {
  Random random{10};
  std::deque<Buffer<char>> packed;
  std::deque<Buffer<float>> numbers;
  std::deque<Buffer<int32_t>> slots;

  Matrix matrix(int64_t heads, int64_t n, int64_t k, int32_t format, bool bias = false) {
    const int64_t bytes = packed_bytes(n, k, format);
    packed.emplace_back(heads * bytes);
    for (int64_t h = 0; h < heads; ++h) {
      Weight(random, n, k, format).pack_into(packed.back().data() + h * bytes, PackTarget::kLinear);
    }
    char* data = packed.back().data();
    return {data, heads, n, k, format, bias ? floats(n) : nullptr};
  }
  Norm norm(int64_t size) { return {floats(size), size, 1e-6}; }
  float* floats(int64_t count) {
    numbers.push_back(normals(random, count));
    return numbers.back().data();
  }
  char* cache(int64_t heads, int64_t dim) {
    packed.emplace_back(kBlocks * heads * kBlockSize * dim * element_size(kBFloat16));
    return packed.back().data();
  }
  Mixture mixture(int64_t experts, int64_t intermediate, int32_t format) {
    const int64_t up_bytes = packed_gate_up_bytes(intermediate, kHidden, format);
    const int64_t down_bytes = packed_bytes(kHidden, intermediate, format);
    packed.emplace_back(experts * up_bytes);
    char* gate_up = packed.back().data();
    packed.emplace_back(experts * down_bytes);
    char* down = packed.back().data();
    for (int64_t e = 0; e < experts; ++e) {
      Weight(random, intermediate, kHidden, format).pack_into(gate_up + e * up_bytes, PackTarget::kGate);
      Weight(random, intermediate, kHidden, format).pack_into(gate_up + e * up_bytes, PackTarget::kUp);
      Weight(random, kHidden, intermediate, format).pack_into(down + e * down_bytes, PackTarget::kLinear);
    }
    const bool routed = experts > 1;
    const RouterRules rules{routed ? 2 : 1, 1, 1, false, true, false, false, 1.0, 0.0};
    packed.emplace_back(2 * experts);  // two masks: without the first expert, without the last
    char* masks = packed.back().data();
    for (int64_t e = 0; e < experts; ++e) masks[e] = e > 0, masks[experts + e] = e + 1 < experts;
    slots.emplace_back(experts);  // all experts are in memory, in another order
    for (int64_t e = 0; e < experts; ++e) slots.back().data()[e] = (int32_t)(experts - 1 - e);
    const int32_t* places = slots.back().data();
    // The first mask has a constant for its expert, the second moves its logits.
    float* offsets = floats(2 * experts);
    slots.emplace_back(2 * experts);
    int32_t* stand_ins = slots.back().data();
    for (int64_t e = 0; e < experts; ++e) offsets[e] = 0, stand_ins[e] = e ? -1 : 1, stand_ins[experts + e] = -1;
    const Recovery recovery{offsets, stand_ins, {floats(2 * kHidden), 2}};
    return {routed ? matrix(1, experts, kHidden, kFloat32) : Matrix{}, nullptr, rules, (const uint8_t*)masks, 2, gate_up,
            down, experts, kHidden, intermediate, format, {places, experts, experts, 0}, recovery};
  }
};

Model make_model(Parts& parts, int32_t format) {
  const Norm hidden = parts.norm(kHidden);
  const GroupedAttention grouped{parts.matrix(1, 128, kHidden, format, true), parts.matrix(1, kHidden, 64, format),
                                 parts.norm(16), parts.norm(16), true, 2.0, 0.25};
  const LatentAttention latent{parts.matrix(1, 72, kHidden, format), parts.norm(32), parts.matrix(1, 144, 32, format),
                               parts.norm(24), parts.matrix(4, 24, 20, kBFloat16), parts.matrix(4, 12, 24, kBFloat16),
                               parts.matrix(1, kHidden, 48, format), 0.2};
  const LayerCache grouped_cache{parts.cache(2, 16), parts.cache(2, 16), {kBlocks, 2, kBlockSize, 16, 16, kBFloat16}};
  const LayerCache latent_cache{parts.cache(1, 40), nullptr, {kBlocks, 1, kBlockSize, 40, 24, kBFloat16}};
  const Table embedding{(const char*)parts.floats(kVocabulary * kHidden), kVocabulary, kHidden, kFloat32};
  const Layer first{hidden, grouped, grouped_cache, hidden, parts.mixture(kExperts, 48, format), parts.mixture(1, 32, format)};
  const Layer second{hidden, latent, latent_cache, hidden, parts.mixture(1, 80, format), Mixture{}};
  const Rotation rotation{parts.floats(kPositions * 8), parts.floats(kPositions * 8), kPositions, 8, false};
  return {embedding, {first, second}, hidden, parts.matrix(1, kVocabulary, kHidden, format), rotation};
}

// `count` tokens of each of two sequences, from position `first` on; all logits are wanted.
void one_step(StepProgram& program, int64_t first, int64_t count, int64_t bad_token, Outputs* outputs) {
  Buffer<int64_t> ids(2 * count), slots(2 * count), logit_rows(2 * count);
  Buffer<int32_t> positions(2 * count), rows(2 * count), tables(2 * 6);
  for (int i = 0; i < 12; ++i) tables[i] = (i * 5 + 3) % (int)kBlocks;
  for (int64_t i = 0; i < 2 * count; ++i) {
    const int64_t row = i / count, position = first + i % count;
    ids[i] = i == bad_token ? kVocabulary : (7 * i + first) % kVocabulary;
    positions[i] = (int32_t)position;
    rows[i] = (int32_t)row;
    slots[i] = tables[row * 6 + position / kBlockSize] * kBlockSize + position % kBlockSize;
    logit_rows[i] = i;
  }
  Buffer<float> logits(2 * count * kVocabulary);
  Buffer<int32_t> mask_rows(2 * count);
  for (int64_t i = 0; i < 2 * count; ++i) mask_rows[i] = (int32_t)(i % 3) - 1;
  Buffer<float> lost(2 * count);
  for (int64_t i = 0; i < 2 * count; ++i) lost[i] = 0;
  int64_t outside = 0;
  program.run({ids.data(), positions.data(), slots.data(), rows.data(), tables.data(), logit_rows.data(),
               mask_rows.data(), 2 * count, 2, 6, 2 * count, {lost.data(), &outside}}, logits.data());
  if (outside) fail("experts outside their mask", (double)outside, 0);
  for (int64_t i = 0; i < logits.size(); ++i) {
    if (!std::isfinite(logits[i])) fail("logit", logits[i], 0);
  }
  if (outputs) outputs->keep(logits);
}

}  // namespace

void check_step(Outputs& outputs) {
  for (const int32_t format : {(int32_t)kBFloat16, (int32_t)kInt8, kInt4 | 32 << 8}) {
    Parts parts;
    StepProgram program(make_model(parts, format));
    one_step(program, 0, 30, -1, &outputs);
    one_step(program, 30, 1, -1, &outputs);
    try {
      one_step(program, 31, 2, 1, nullptr);
      fail("a token beyond the vocabulary", 0, 1);
    } catch (const KernelFault&) {
    }
    one_step(program, 31, 9, -1, &outputs);
  }
}
