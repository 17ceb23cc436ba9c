// Rows of an int8 cache, as cache_layout.h says. Included inside an anonymous namespace, after row_integers.h.

// Symmetric, to the nearest code, halves to even; quantise_block says what becomes of NaN and of very small numbers.
static void quantize_row(const float* x, char* row, int64_t dim) {
  alignas(64) int32_t codes[kScaleGroup];
  for (int64_t i = 0; i < dim; i += kScaleGroup) {
    const int64_t count = dim - i < kScaleGroup ? dim - i : kScaleGroup;
    float scale = quantise_block(x + i, count, 127.0f, codes);
    if (scale != scale) scale = __builtin_nanf("");  // always the same bits
    for (int64_t k = 0; k < count; ++k) row[i + k] = (char)codes[k];
    __builtin_memcpy(row + int8_codes_bytes(dim) + i / kScaleGroup * 4, &scale, 4);
  }
}

static inline float scale_of(const char* row, int64_t dim, int64_t column) {
  float scale;
  __builtin_memcpy(&scale, row + int8_codes_bytes(dim) + column / kScaleGroup * 4, 4);
  return scale;
}

static void dequantize_row(const char* row, void* out, int64_t dim) {
  for (int64_t i = 0; i < dim; i += kLanes) {
    const Vec scale = v_set(scale_of(row, dim, i));
    const int64_t n = dim - i < kLanes ? dim - i : kLanes;
    const Vec codes = n < kLanes ? v_load_codes_n(row + i, n) : v_load_codes(row + i);
    v_store_up_to((float*)out + i, v_mul(codes, scale), n);
  }
}
