// Activation rows for integer weights: quantised in blocks of 64 (layout.h). Included inside an anonymous namespace.

// Beyond them a block is all zeros: the inverse of its scale would overflow.
static constexpr float kSmallest = 1e-30f;

// One block: `count` values (zeros behind them), to integers of at most `largest`. Returns the scale.
static inline float quantise_block(const float* in, int64_t count, float largest, int32_t* out) {
  alignas(64) float x[kRowBlock] = {0};
  __builtin_memcpy(x, in, (size_t)count * sizeof(float));
  Vec top = v_zero(), strange = v_zero();
  for (int64_t i = 0; i < kRowBlock; i += kLanes) {
    const Vec v = v_load(x + i);
    top = v_max(top, v_max(v, v_sub(v_zero(), v)));
    strange = v_add(strange, v_sub(v, v));  // NaN once a value is NaN or infinite
  }
  const float odd = fold_sum(v_fold(strange)), amax = v_max_lane(top);
  if (odd != odd || !(amax >= kSmallest)) {
    __builtin_memset(out, 0, kRowBlock * sizeof(int32_t));
    return odd != odd ? odd : 0.0f;
  }
  const Vec inverse = v_set(largest / amax);
  for (int64_t i = 0; i < kRowBlock; i += kLanes) v_store_int(out + i, v_mul(v_load(x + i), inverse));
  return amax / largest;
}

static void write_block(const float* in, int64_t count, int64_t block, char* row, int64_t k, int32_t type) {
  alignas(64) int32_t q[kRowBlock];
  int8_t* high = (int8_t*)row + block * kRowBlock;
  const float scale = quantise_block(in, count, type == kRowInt16 ? 127 * 128.0f : 127.0f, q);
  ((float*)(row + row_scales_offset(k, type)))[block] = scale;
  int32_t* sums = (int32_t*)(row + row_sums_offset(k, type)) + 2 * block;
  for (int half = 0; half < 2; ++half) {
    int32_t sum = 0;
    for (int i = 0; i < 32; ++i) sum += q[32 * half + i];
    sums[half] = sum;
  }
  if (type == kRowInt8) {
    for (int64_t i = 0; i < kRowBlock; ++i) high[i] = (int8_t)q[i];
    return;
  }
  int8_t* low = high + round_up(k, kRowBlock);
  for (int64_t i = 0; i < kRowBlock; ++i) {
    const int32_t top = (q[i] + 64) >> 7;  // low stays within [-64, 63]: AVX2 may multiply it by 255 and add pairs
    high[i] = (int8_t)top;
    low[i] = (int8_t)(q[i] - top * 128);
  }
}

static void write_row(const float* in, char* row, int64_t first, int64_t count, int64_t k, int32_t type) {
  if (type == kRowFloat32 || type == kRowBFloat16) {
    convert(in, row + first * element_size(type), count, type);
    if (first + count == k && k % 2) __builtin_memset(row + k * element_size(type), 0, (size_t)element_size(type));
    return;
  }
  for (int64_t i = 0; i < count; i += kRowBlock) {
    write_block(in + i, count - i < kRowBlock ? count - i : kRowBlock, (first + i) / kRowBlock, row, k, type);
  }
}
