// Dense linear layers and the fused mixture of experts against loops over doubles.
#include "check.h"

namespace {

double largest(const float* x, int64_t count) {
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, (double)std::fabs(x[i]));
  return largest;
}

struct Number {
  double value, error;  // error: a bound
};

Number dot(const float* x, const Weight& w, int64_t row) {
  double sum = 0, size = 0;
  for (int64_t i = 0; i < w.k; ++i) {
    sum += x[i] * w.at(row, i);
    size += std::fabs(w.at(row, i));
  }
  return {sum, tolerance(w.format, w.k) * largest(x, w.k) * size + 1e-30};
}

void expect(const char* what, double got, Number wanted) {
  if (!(std::fabs(got - wanted.value) <= wanted.error)) fail(what, got, wanted.value);
}

struct LinearCase {
  int64_t tokens, heads, n, k;
  bool bias;
};

void one_linear(const LinearCase& c, int32_t format, Random& random, Outputs& outputs) {
  std::vector<Weight> weights;
  const int64_t bytes = packed_bytes(c.n, c.k, format);
  Buffer<char> packed(c.heads * bytes, random.below(2));
  for (int64_t h = 0; h < c.heads; ++h) {
    weights.emplace_back(random, c.n, c.k, format);
    weights.back().pack_into(packed.data() + h * bytes, PackTarget::kLinear);
  }
  const Buffer<float> x = normals(random, c.tokens * c.heads * c.k), bias = normals(random, c.n);
  Buffer<float> out(c.tokens * c.heads * c.n, random.below(2));
  linear(x.data(), c.tokens, c.heads, c.k, packed.data(), c.n, format, c.bias ? bias.data() : nullptr, out.data());
  outputs.keep(out);
  for (int64_t i = 0; outputs.naive && i < out.size(); ++i) {
    const int64_t head = i / c.n % c.heads, token = i / c.n / c.heads, column = i % c.n;
    Number wanted = dot(x.data() + (token * c.heads + head) * c.k, weights[(size_t)head], column);
    if (c.bias) wanted = {wanted.value + bias[column], wanted.error + 1e-6};
    expect("linear", out[i], wanted);
  }
}

struct MoeCase {
  int64_t tokens, top_k, hidden, intermediate, experts;
  bool one_expert;  // takes everything, but for what constants take
  int64_t constants = 0;
};

struct Expert {
  Weight gate, up, down;
};

// One token through one expert, with a bound on the error of every number on the way.
void add_expert(const Expert& expert, const float* x, double weight, std::vector<Number>& total) {
  const int64_t width = expert.gate.n;
  std::vector<Number> h;
  double largest_h = 0;
  for (int64_t i = 0; i < width; ++i) {
    const Number gate = dot(x, expert.gate, i), up = dot(x, expert.up, i);
    const double silu = gate.value / (1 + std::exp(-gate.value));
    h.push_back({silu * up.value, 1.1 * gate.error * (std::fabs(up.value) + up.error) + std::fabs(silu) * up.error});
    largest_h = std::max(largest_h, std::fabs(h.back().value));
  }
  for (size_t j = 0; j < total.size(); ++j) {
    for (int64_t i = 0; i < width; ++i) {
      const double w = expert.down.at((int64_t)j, i) * weight;
      total[j].value += h[(size_t)i].value * w;
      total[j].error += std::fabs(w) * (h[(size_t)i].error + tolerance(expert.down.format, width) * largest_h);
    }
  }
}

void one_moe(const MoeCase& c, int32_t format, Random& random, Outputs& outputs) {
  const int64_t up_bytes = packed_gate_up_bytes(c.intermediate, c.hidden, format);
  const int64_t down_bytes = packed_bytes(c.hidden, c.intermediate, format);
  Buffer<char> gate_up(c.experts * up_bytes), down(c.experts * down_bytes);
  std::vector<Expert> experts;
  for (int64_t e = 0; e < c.experts; ++e) {
    experts.push_back({Weight(random, c.intermediate, c.hidden, format), Weight(random, c.intermediate, c.hidden, format),
                       Weight(random, c.hidden, c.intermediate, format)});
    experts.back().gate.pack_into(gate_up.data() + e * up_bytes, PackTarget::kGate);
    experts.back().up.pack_into(gate_up.data() + e * up_bytes, PackTarget::kUp);
    experts.back().down.pack_into(down.data() + e * down_bytes, PackTarget::kLinear);
  }
  const Buffer<float> x = normals(random, c.tokens * c.hidden), weights = normals(random, c.tokens * c.top_k);
  Buffer<int32_t> ids(c.tokens * c.top_k);
  for (int64_t i = 0; i < ids.size(); ++i) {
    const int64_t first = c.one_expert ? c.experts - 1 : 0;
    ids[i] = (int32_t)(first + (int64_t)random.below((uint64_t)(c.experts + c.constants - first)));
  }
  const Buffer<float> constants = normals(random, c.constants * c.hidden);
  Buffer<float> out(c.tokens * c.hidden);
  fused_moe(x.data(), ids.data(), weights.data(), gate_up.data(), down.data(),
            {c.tokens, c.top_k, c.hidden, c.intermediate, c.experts}, format, out.data(), {constants.data(), c.constants});
  outputs.keep(out);
  for (int64_t t = 0; outputs.naive && t < c.tokens; ++t) {
    std::vector<Number> total((size_t)c.hidden, Number{0, 1e-6});
    for (int64_t s = t * c.top_k; s < (t + 1) * c.top_k; ++s) {
      if (ids[s] < c.experts) {
        add_expert(experts[(size_t)ids[s]], x.data() + t * c.hidden, weights[s], total);
        continue;
      }
      for (int64_t j = 0; j < c.hidden; ++j) {
        const double part = (double)weights[s] * constants[(ids[s] - c.experts) * c.hidden + j];
        total[(size_t)j].value += part;
        total[(size_t)j].error += 0x1p-22 * std::fabs(part);
      }
    }
    for (int64_t j = 0; j < c.hidden; ++j) expect("fused_moe", out[t * c.hidden + j], total[(size_t)j]);
  }
}

}  // namespace

void check_linear(Outputs& outputs) {
  Random random(2);
  const LinearCase cases[] = {
      {0, 1, 5, 7, false},   {1, 1, 1, 1, true},     {2, 1, 16, 32, false},    {3, 2, 48, 7, false},
      {17, 1, 33, 65, true}, {33, 3, 130, 100, true}, {100, 1, 80, 192, false}, {1, 1, 700, 320, true},
  };
  for (const int32_t format : kFormats) {
    for (const LinearCase& c : cases) one_linear(c, format, random, outputs);
  }
}

void check_moe(Outputs& outputs) {
  Random random(3);
  const MoeCase cases[] = {
      {0, 1, 32, 16, 2, false},  {1, 1, 48, 16, 1, false}, {2, 3, 33, 40, 3, false},
      {17, 2, 72, 96, 8, false}, {40, 1, 65, 31, 4, true}, {1, 4, 320, 208, 6, false},
      {19, 3, 70, 40, 2, false, 3}, {2, 1, 33, 16, 1, true, 9},
  };
  for (const int32_t format : kFormats) {
    for (const MoeCase& c : cases) one_moe(c, format, random, outputs);
  }
}
