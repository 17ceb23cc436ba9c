// Weights of every format, and that packing keeps every bit of them.
#include "check.h"

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bfloat16(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

namespace {

// Of a number that is a multiple of 2^-10 and at most 4: exact in float16.
uint16_t to_float16(float value) {
  if (value == 0) return 0;
  int exponent;
  const float mantissa = std::frexp(std::fabs(value), &exponent);  // [0.5, 1)
  const uint16_t fraction = (uint16_t)(mantissa * 2048) & 0x3ff;
  return (uint16_t)((value < 0) << 15 | (exponent + 14) << 10 | fraction);
}

}  // namespace

Weight::Weight(Random& random, int64_t rows, int64_t columns, int32_t weight_format)
    : n(rows), k(columns), format(weight_format), values((size_t)(n * k)) {
  if (!is_integer(format)) {
    const int64_t size = element_size(format);
    plain_.resize((size_t)(n * k * size));
    for (int64_t i = 0; i < n * k; ++i) {
      // Few enough bits for every format.
      const float value = (float)std::lround(random.normal() * 64) / 64;
      const uint16_t half = format == kBFloat16 ? to_bfloat16(value) : to_float16(value);
      if (size == 4) std::memcpy(&plain_[(size_t)(i * 4)], &value, 4);
      else std::memcpy(&plain_[(size_t)(i * 2)], &half, 2);
      values[(size_t)i] = format == kBFloat16 ? from_bfloat16(half) : value;
    }
    return;
  }
  const bool int4 = format_kind(format) == kInt4;
  const int64_t group = int4 ? format_group(format) : k, groups = (k + group - 1) / group;
  codes_.resize((size_t)(n * k));
  scales_.resize((size_t)(n * groups));
  if (format_zeros(format)) zeros_.resize((size_t)(n * groups));
  for (auto& scale : scales_) scale = std::ldexp(1.0f, -5 - (int)random.below(3));
  for (auto& zero : zeros_) zero = (uint8_t)random.below(16);
  for (int64_t i = 0; i < n * k; ++i) {
    codes_[(size_t)i] = (uint8_t)(int4 ? random.below(16) : 1 + random.below(255));
    const size_t at = (size_t)(i / k * groups + i % k / group);
    const int zero = !int4 ? 128 : zeros_.empty() ? 8 : zeros_[at];
    values[(size_t)i] = (double)scales_[at] * (codes_[(size_t)i] - zero);
  }
}

void Weight::pack_into(char* packed, PackTarget target) const {
  if (!is_integer(format)) pack(plain_.data(), n, k, format, target, packed);
  else pack_integer(codes_.data(), scales_.data(), zeros_.empty() ? nullptr : zeros_.data(), n, k, format, target, packed);
  std::vector<char> plain(plain_.size());
  std::vector<uint8_t> codes(codes_.size()), zeros(zeros_.size());
  std::vector<float> scales(scales_.size());
  if (!is_integer(format)) unpack(packed, n, k, format, target, plain.data());
  else unpack_integer(packed, n, k, format, target, codes.data(), scales.data(), zeros.empty() ? nullptr : zeros.data());
  if (plain != plain_ || codes != codes_ || scales != scales_ || zeros != zeros_) fail("unpacked bits", format, (double)k);
}

void check_packing(Outputs& outputs) {
  Random random(1);
  for (const int32_t format : kFormats) {
    for (const auto& [n, k] : {std::pair<int64_t, int64_t>{1, 1}, {16, 32}, {33, 65}, {130, 257}, {300, 512}}) {
      Buffer<char> packed(packed_bytes(n, k, format));
      Weight(random, n, k, format).pack_into(packed.data(), PackTarget::kLinear);
      outputs.keep(packed);
      Buffer<char> both(packed_gate_up_bytes(n, k, format));
      Weight(random, n, k, format).pack_into(both.data(), PackTarget::kGate);
      Weight(random, n, k, format).pack_into(both.data(), PackTarget::kUp);
      outputs.keep(both);
    }
  }
}
