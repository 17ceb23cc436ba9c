// Writes and reads int8 and int4 weights in the layout of layout.h. Codes and zero points are moved bit by bit; a scale
// becomes (float32 power of two of its column) x (float16 of its group) and is refused if that would change it.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>

#include "errors.h"
#include "pack_tiles.h"

namespace {

// float16 <-> float32 without the instructions for it: this file runs on any x86-64.
float from_half(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const float value = exponent ? std::ldexp(1024.0f + (float)fraction, exponent - 25) : std::ldexp((float)fraction, -24);
  return half & 0x8000 ? -value : value;
}

// Of a value in [-1, 1]; truncates what does not fit.
uint16_t to_half(float value) {
  if (value < 0) return 0x8000 | to_half(-value);
  if (!(value > 0)) return 0;
  int exponent;
  const float fraction = std::frexp(value, &exponent);  // value = fraction * 2^exponent, fraction in [0.5, 1)
  if (exponent < -13) return (uint16_t)std::ldexp(value, 24);
  return (uint16_t)((exponent + 14) << 10 | ((int)std::ldexp(fraction, 11) - 1024));
}

// A panel's header, seen from one of its two tiles.
struct Header {
  float* column_scale;    // [16]
  uint16_t* group_scale;  // [scale groups][32], this tile's 16 first
  uint8_t* zero;          // likewise, or null
  Header(char* panel, int64_t slot, int64_t k, int32_t format)
      : column_scale((float*)panel + slot * kTileColumns),
        group_scale((uint16_t*)(panel + kPanelColumns * 4) + slot * kTileColumns),
        zero(format_zeros(format) ? (uint8_t*)panel + zeros_offset(k, format) + slot * kTileColumns : nullptr) {}
};

struct Matrix {
  int64_t n, k, groups;  // groups: scales per column as the caller holds them
  int32_t format;
  Matrix(int64_t n, int64_t k, int32_t format)
      : n(n), k(k), groups(format_kind(format) == kInt8 ? 1 : (k + format_group(format) - 1) / format_group(format)),
        format(format) {}
};

// False if a scale cannot be stored as it is.
bool pack_scales(const float* scales, const uint8_t* zeros, const Matrix& m, int64_t column, int64_t c, Header& header) {
  const bool real = column < m.n;
  const float* own = scales + column * m.groups;
  float column_scale = 1;
  if (real && format_kind(m.format) == kInt8) column_scale = own[0];
  if (real && format_kind(m.format) == kInt4) {
    float largest = 0;  // scales may be negative: so a group's largest weight can have the code 0, 8 steps from 8
    for (int64_t g = 0; g < m.groups; ++g) largest = std::max(largest, std::fabs(own[g]));
    int exponent = 0;
    if (largest > 0) std::frexp(largest, &exponent);
    column_scale = std::ldexp(1.0f, std::clamp(exponent, -126, 127));
  }
  header.column_scale[c] = column_scale;
  for (int64_t g = 0; g < scale_groups(m.k, m.format); ++g) {
    const float scale = real && g < m.groups ? own[g] : column_scale;
    const uint16_t half = to_half(scale / column_scale);
    if (from_half(half) * column_scale != scale) return false;
    header.group_scale[g * kPanelColumns + c] = half;
    if (header.zero) header.zero[g * kPanelColumns + c] = real && g < m.groups ? zeros[column * m.groups + g] : 8;
  }
  return true;
}

uint8_t zero_point(const Matrix& m, const Header& header, int64_t c, int64_t k) {
  if (format_kind(m.format) == kInt8) return 128;
  return header.zero ? header.zero[k / format_group(m.format) * kPanelColumns + c] : 8;
}

// Eight codes of one column, of consecutive k from `first`, the zero point where there are none.
void eight_codes(const uint8_t* codes, const Matrix& m, const Header& header, int64_t column, int64_t c, int64_t first,
                 uint8_t* out) {
  for (int64_t j = 0; j < 8; ++j) {
    const bool real = column < m.n && first + j < m.k;
    out[j] = real ? codes[column * m.k + first + j] : zero_point(m, header, c, first + j);
  }
}

}  // namespace

void pack_integer(const uint8_t* codes, const float* scales, const uint8_t* zeros, int64_t n, int64_t k, int32_t format,
                  PackTarget target, char* packed) {
  const Matrix m(n, k, format);
  const bool wide = format_kind(format) == kInt8;
  std::atomic<int64_t> refused{-1};  // workers must not throw
  for_each_tile(n, k, target, [&](int64_t tile) {
    const Place place = place_of(tile, target);
    char* panel = packed + place.panel * panel_bytes(k, format);
    Header header(panel, place.slot, k, format);
    if (place.slot == 0 && header.zero) {  // the header's padding
      const int64_t end = zeros_offset(k, format) + kPanelColumns * scale_groups(k, format);
      std::memset(panel + end, 0, (size_t)(header_bytes(k, format) - end));
    }
    uint32_t* words = (uint32_t*)(panel + header_bytes(k, format)) + place.slot * kTileColumns;
    for (int64_t c = 0; c < kTileColumns; ++c) {
      const int64_t column = tile * kTileColumns + c;
      if (!pack_scales(scales, zeros, m, column, c, header)) refused = column;
      for (int64_t at = 0; at < padded_k(k, format); at += 8) {
        uint8_t eight[8];
        if (column < n && at + 8 <= k) std::memcpy(eight, codes + column * k + at, 8);
        else eight_codes(codes, m, header, column, c, at, eight);
        uint32_t low, high;
        std::memcpy(&low, eight, 4);
        std::memcpy(&high, eight + 4, 4);
        if (wide) {
          words[at / 4 * kPanelColumns + c] = low;
          words[(at / 4 + 1) * kPanelColumns + c] = high;
        } else {
          words[at / 8 * kPanelColumns + c] = low | high << 4;
        }
      }
    }
  });
  if (refused >= 0) {
    throw KernelFault("pack: a scale of output column " + std::to_string(refused) +
                      " is not a float16 times a power of two near the column's largest");
  }
}

void unpack_integer(const char* packed, int64_t n, int64_t k, int32_t format, PackTarget target, uint8_t* codes,
                    float* scales, uint8_t* zeros) {
  const Matrix m(n, k, format);
  const bool wide = format_kind(format) == kInt8;
  for_each_tile(n, k, target, [&](int64_t tile) {
    const Place place = place_of(tile, target);
    char* panel = const_cast<char*>(packed) + place.panel * panel_bytes(k, format);
    const Header header(panel, place.slot, k, format);
    const uint8_t* bytes = (const uint8_t*)panel + header_bytes(k, format) + place.slot * kTileColumns * 4;
    for (int64_t c = 0; c < kTileColumns && tile * kTileColumns + c < n; ++c) {
      const int64_t column = tile * kTileColumns + c;
      for (int64_t g = 0; g < m.groups; ++g) {
        const float group_scale = wide ? 1.0f : from_half(header.group_scale[g * kPanelColumns + c]);
        scales[column * m.groups + g] = header.column_scale[c] * group_scale;
        if (header.zero) zeros[column * m.groups + g] = header.zero[g * kPanelColumns + c];
      }
      for (int64_t i = 0; i < k; ++i) {
        const uint8_t byte = bytes[(i / group_size(format) * kPanelColumns + c) * 4 + i % 4];
        codes[column * k + i] = wide ? byte : i % 8 < 4 ? byte & 15 : byte >> 4;
      }
    }
  });
}
