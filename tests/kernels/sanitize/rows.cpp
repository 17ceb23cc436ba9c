// Norms, SwiGLU, rotary positions and the router; and that wrong values are refused.
#include <limits>

#include "check.h"
#include "errors.h"

namespace {

void expect(const char* what, double got, double wanted, double tolerance) {
  if (!(std::fabs(got - wanted) <= tolerance)) fail(what, got, wanted);
}

void one_norm(int64_t rows, int64_t dim, bool with_residual, Random& random, Outputs& outputs) {
  const Buffer<float> x = normals(random, rows * dim), residual = normals(random, rows * dim), weight = normals(random, dim);
  Buffer<float> out(rows * dim), total(rows * dim);
  rms_norm(x.data(), with_residual ? residual.data() : nullptr, weight.data(), 1e-6, rows, dim, out.data(),
           with_residual ? total.data() : nullptr);
  outputs.keep(out);
  for (int64_t r = 0; outputs.naive && r < rows; ++r) {
    double squares = 0;
    std::vector<double> sums;
    for (int64_t i = r * dim; i < (r + 1) * dim; ++i) {
      sums.push_back((double)x[i] + (with_residual ? residual[i] : 0.0f));
      squares += sums.back() * sums.back();
      if (with_residual) expect("rms_norm total", total[i], sums.back(), 1e-5);
    }
    const double factor = 1 / std::sqrt(squares / (double)dim + 1e-6);
    for (int64_t i = 0; i < dim; ++i) expect("rms_norm", out[r * dim + i], sums[(size_t)i] * factor * weight[i], 1e-4);
  }
}

void one_silu_mul(int64_t count, Random& random, Outputs& outputs) {
  const Buffer<float> gate = normals(random, count), up = normals(random, count);
  Buffer<float> out(count);
  silu_mul(gate.data(), up.data(), count, out.data());
  outputs.keep(out);
  for (int64_t i = 0; outputs.naive && i < count; ++i) {
    expect("silu_mul", out[i], gate[i] / (1 + std::exp(-(double)gate[i])) * up[i], 1e-5);
  }
}

void one_rope(int64_t tokens, int64_t heads, int64_t dim, int64_t half, bool interleaved, Random& random, Outputs& outputs) {
  Buffer<float> x = normals(random, tokens * heads * dim);
  const std::vector<float> before(x.data(), x.data() + x.size());
  const Buffer<float> cos = normals(random, 9 * half), sin = normals(random, 9 * half);
  Buffer<int32_t> positions(tokens);
  for (int64_t t = 0; t < tokens; ++t) positions[t] = (int32_t)random.below(9);
  const int64_t offset = dim - 2 * half, partner = interleaved ? 1 : half;
  rope(x.data(), tokens, heads, dim, cos.data(), sin.data(), 9, half, positions.data(), interleaved, offset);
  outputs.keep(x);
  for (int64_t row = 0; outputs.naive && row < tokens * heads; ++row) {
    for (int64_t i = 0; i < half; ++i) {
      const int64_t at = row * dim + offset + (interleaved ? 2 * i : i);
      const double c = cos[positions[row / heads] * half + i], s = sin[positions[row / heads] * half + i];
      const double a = before[(size_t)at], b = before[(size_t)(at + partner)];
      expect("rope", x[at], a * c - b * s, 1e-5);
      expect("rope", x[at + partner], b * c + a * s, 1e-5);
    }
  }
}

// `recovers`: who the second mask forbids has a constant, and the third one's logits are moved.
void one_route(int64_t tokens, int64_t experts, const RouterRules& rules, bool with_bias, bool recovers, Random& random,
               Outputs& outputs) {
  Buffer<float> logits = normals(random, tokens * experts);
  const Buffer<float> bias = normals(random, experts);
  for (int64_t i = 0; i < logits.size(); i += 7) {
    const float awkward[] = {NAN, INFINITY, -INFINITY, std::numeric_limits<float>::max(), 0.0f};
    logits[i] = awkward[random.below(5)];
  }
  Buffer<int32_t> ids(tokens * rules.top_k);
  Buffer<float> weights(tokens * rules.top_k);
  Buffer<uint8_t> allowed(3 * experts);  // of the first mask too few, of the second every other, of the third all
  for (int64_t e = 0; e < experts; ++e) allowed[e] = e == 3, allowed[experts + e] = e % 2, allowed[2 * experts + e] = 1;
  Buffer<int32_t> mask_rows(tokens);
  for (int64_t t = 0; t < tokens; ++t) mask_rows[t] = (int32_t)random.below(4) - 1;
  Buffer<float> lost(tokens);
  for (int64_t t = 0; t < tokens; ++t) lost[t] = 0;
  Buffer<float> offsets(3 * experts);
  Buffer<int32_t> stand_ins(3 * experts);
  for (int64_t i = 0; i < 3 * experts; ++i) {
    stand_ins[i] = i >= experts && !allowed[i] ? (int32_t)(2 * experts - 1 - i) : -1;
    offsets[i] = i < 2 * experts ? 0.0f : i % 3 ? bias[i % experts] : std::numeric_limits<float>::max();
  }
  int64_t outside = 0;
  route(logits.data(), tokens, experts, with_bias ? bias.data() : nullptr, rules,
        {allowed.data(), 3, mask_rows.data(), recovers ? offsets.data() : nullptr, recovers ? stand_ins.data() : nullptr},
        {lost.data(), &outside}, ids.data(), weights.data());
  outputs.keep(ids);
  outputs.keep(weights);
  outputs.keep(lost);
  for (int64_t i = 0; i < ids.size(); ++i) {
    const int32_t row = mask_rows[i / rules.top_k];
    const bool known = ids[i] < experts || (recovers && row == 1 && ids[i] < 2 * experts);
    if (ids[i] < 0 || !known) fail("route id", ids[i], (double)experts);
    if (recovers && row == 1 && ids[i] < experts && !allowed[experts + ids[i]]) fail("outside the mask", ids[i], 0);
    for (int64_t j = i / rules.top_k * rules.top_k; j < i; ++j) {
      if (ids[i] == ids[j]) fail("route id twice", ids[i], (double)i);
    }
  }
}

template <class F>
void expect_refusal(const char* what, F call) {
  try {
    call();
  } catch (const KernelFault&) {
    return;
  }
  fail(what, 0, 1);
}

}  // namespace

void check_rows(Outputs& outputs) {
  Random random(5);
  for (const int64_t dim : {1, 7, 16, 33, 2048}) {
    for (const int64_t rows : {0, 1, 3, 70}) {
      one_norm(rows, dim, false, random, outputs);
      one_norm(rows, dim, true, random, outputs);
    }
  }
  for (const int64_t count : {0, 1, 15, 4096, 4097, 100001}) one_silu_mul(count, random, outputs);
  for (const bool interleaved : {false, true}) {
    one_rope(1, 1, 2, 1, interleaved, random, outputs);
    one_rope(5, 3, 24, 5, interleaved, random, outputs);
    one_rope(150, 8, 64, 32, interleaved, random, outputs);
  }
}

void check_router(Outputs& outputs) {
  Random random(6);
  //                             top_k groups of  sigmoid normal top2   after scaling epsilon
  const RouterRules rules[] = {{2, 1, 1, false, true, false, false, 1.0, 0.0},
                               {8, 4, 2, true, true, true, false, 2.5, 1e-20},
                               {4, 2, 1, false, false, false, false, 4.0, 0.0},
                               {3, 1, 1, false, false, false, true, 1.0, 0.0},
                               {16, 1, 1, true, false, false, false, 1.0, 0.0}};
  for (const RouterRules& r : rules) {
    for (const int64_t tokens : {0, 1, 17, 600}) {
      for (const bool recovers : {false, true}) one_route(tokens, 16, r, r.sigmoid, recovers, random, outputs);
    }
  }
}

void check_refusals() {
  Random random(7);
  const Buffer<float> x = normals(random, 4 * 32);
  Buffer<float> out(4 * 32);
  Buffer<char> packed(packed_gate_up_bytes(16, 32, kFloat32) * 2);
  std::memset(packed.data(), 0, (size_t)packed.size());
  for (const int32_t bad : {-1, 2, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}) {
    Buffer<int32_t> ids(4);
    for (int i = 0; i < 4; ++i) ids[i] = i == 3 ? bad : 0;
    expect_refusal("fused_moe takes a bad id", [&] {
      fused_moe(x.data(), ids.data(), x.data(), packed.data(), packed.data(), {4, 1, 32, 16, 2}, kFloat32, out.data());
    });
    expect_refusal("rope takes a bad position", [&] {
      rope(out.data(), 4, 1, 32, x.data(), x.data(), 2, 16, ids.data(), false, 0);
    });
    Buffer<int64_t> slots(1);
    slots[0] = bad;
    expect_refusal("write_cache takes a bad slot", [&] {
      write_cache(packed.data(), 1, 1, 2, 32, kFloat32, x.data(), slots.data(), 1);
    });
    Buffer<int32_t> zero(1);
    zero[0] = 0;
    expect_refusal("attention takes a bad block", [&] {
      attention(x.data(), 1, 1, packed.data(), packed.data(), {2, 1, 1, 32, 32, kFloat32}, zero.data(), zero.data(),
                ids.data() + 3, 1, 1, 1.0, out.data());
    });
  }
}
