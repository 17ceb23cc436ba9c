// Elementwise and row kernels, written once over the lanes of simd_*.h. Included inside an anonymous namespace.
// Sums run in an order fixed by the row's length alone.

static inline float fold_sum(__m128 x) {
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}

// All lanes, or the first n of them.
static inline Vec v_load_up_to(const float* p, int64_t n) { return n < kLanes ? v_load_n(p, n) : v_load(p); }
static inline void v_store_up_to(float* p, Vec x, int64_t n) {
  if (n < kLanes) v_store_n(p, x, n);
  else v_store(p, x);
}

// exp to 2 ulp (Cephes' polynomial). Below -87.33 exactly 0, above 88.72 inf, at 0 exactly 1, NaN stays NaN.
static inline Vec v_exp(Vec x) {
  const Vec clamped = v_min(v_set(88.0f), v_max(v_set(-87.0f), x));
  const Vec n = v_round(v_mul(clamped, v_set(1.44269504088896341f)));
  Vec r = v_fma(n, v_set(-0.693359375f), clamped);
  r = v_fma(n, v_set(2.12194440e-4f), r);
  Vec p = v_set(1.9875691500e-4f);
  p = v_fma(p, r, v_set(1.3981999507e-3f));
  p = v_fma(p, r, v_set(8.3334519073e-3f));
  p = v_fma(p, r, v_set(4.1665795894e-2f));
  p = v_fma(p, r, v_set(1.6666665459e-1f));
  p = v_fma(p, r, v_set(5.0000001201e-1f));
  p = v_fma(v_mul(p, r), r, v_add(r, v_set(1.0f)));
  const Vec y = v_mul(p, v_exponent(n));
  return v_where_below(x, -87.0f, v_zero(), v_where_above(x, 88.0f, v_set(__builtin_inff()), y));
}

static inline Vec v_silu_mul(Vec gate, Vec up) {
  const Vec minus = v_sub(v_zero(), gate);
  return v_mul(v_div(gate, v_add(v_set(1.0f), v_exp(minus))), up);
}

static void silu_mul(const float* gate, const float* up, float* out, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) v_store(out + i, v_silu_mul(v_load(gate + i), v_load(up + i)));
  const int64_t rest = count - i;
  if (rest) v_store_n(out + i, v_silu_mul(v_load_n(gate + i, rest), v_load_n(up + i, rest)), rest);
}

static void convert(const float* in, void* out, int64_t count, int32_t dtype) {
  if (dtype == kFloat32) {
    __builtin_memcpy(out, in, (size_t)count * sizeof(float));
    return;
  }
  uint16_t* half = (uint16_t*)out;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) v_store_bf16(half + i, v_load(in + i));
  if (i < count) v_store_bf16_n(half + i, v_load_n(in + i, count - i), count - i);
}

// Turns the pairs (i, i + half), or (2i, 2i + 1) when interleaved, of x by the angles of cos and sin. Products are
// rounded before they are added, so that vectors and tail agree.
static void rotate(float* x, const float* cos, const float* sin, int64_t half, bool interleaved) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i < kLanes ? half - i : kLanes;
    const Vec c = v_load_up_to(cos + i, n), s = v_load_up_to(sin + i, n);
    if (interleaved) {
      float *at = x + 2 * i, *behind = at + kLanes;
      const int64_t first = 2 * n < kLanes ? 2 * n : kLanes, second = 2 * n - first;
      v_store_up_to(at, v_turn_pairs(v_load_up_to(at, first), v_double_low(c), v_double_low(s)), first);
      if (second == 0) break;
      v_store_up_to(behind, v_turn_pairs(v_load_up_to(behind, second), v_double_high(c), v_double_high(s)), second);
    } else {
      float *a = x + i, *b = x + half + i;
      const Vec u = v_load_up_to(a, n), v = v_load_up_to(b, n);
      v_store_up_to(a, v_sub(v_mul(u, c), v_mul(v, s)), n);
      v_store_up_to(b, v_add(v_mul(v, c), v_mul(u, s)), n);
    }
  }
}

static void rms_norm(const float* x, const float* residual, const float* weight, float eps, int64_t dim, float* out,
                     float* total) {
  if (residual) {
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) v_store(total + i, v_add(v_load(x + i), v_load(residual + i)));
    const int64_t rest = dim - i;
    if (rest) v_store_n(total + i, v_add(v_load_n(x + i, rest), v_load_n(residual + i, rest)), rest);
    x = total;
  }
  Vec a = v_zero(), b = v_zero();
  int64_t i = 0;
  for (; i + 2 * kLanes <= dim; i += 2 * kLanes) {
    const Vec u = v_load(x + i), v = v_load(x + i + kLanes);
    a = v_fma(u, u, a);
    b = v_fma(v, v, b);
  }
  for (; i < dim; i += kLanes) {
    const Vec u = dim - i < kLanes ? v_load_n(x + i, dim - i) : v_load(x + i);
    a = v_fma(u, u, a);
  }
  const float mean = fold_sum(v_fold(v_add(a, b))) / (float)dim;
  const Vec factor = v_set(1.0f / __builtin_sqrtf(mean + eps));
  for (i = 0; i + kLanes <= dim; i += kLanes) {
    v_store(out + i, v_mul(v_mul(v_load(x + i), factor), v_load(weight + i)));
  }
  const int64_t rest = dim - i;
  if (rest) v_store_n(out + i, v_mul(v_mul(v_load_n(x + i, rest), factor), v_load_n(weight + i, rest)), rest);
}

static void weighted_sum(const float* const* rows, const float* weights, int64_t num_rows, int64_t dim, float* out) {
  for (int64_t i = 0; i < dim; i += kLanes) {
    const int64_t n = dim - i < kLanes ? dim - i : kLanes;
    Vec sum = v_zero();
    for (int64_t r = 0; r < num_rows; ++r) {
      const Vec row = n < kLanes ? v_load_n(rows[r] + i, n) : v_load(rows[r] + i);
      sum = v_fma(v_set(weights[r]), row, sum);
    }
    if (n < kLanes) v_store_n(out + i, sum, n);
    else v_store(out + i, sum);
  }
}

static float largest(const float* x, int64_t count) {
  Vec top = v_set(-__builtin_inff());
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) top = v_max(v_load(x + i), top);  // of a NaN and `top`, `top`
  float best = v_max_lane(top);
  for (; i < count; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

static void exponentials(const float* x, int64_t count, float best, float temperature, float* y, float* w,
                         float* block_best, double* block_mass) {
  const Vec shift = v_set(best), divisor = v_set(temperature);
  for (int64_t first = 0; first < count; first += kSampleBlock) {
    const int64_t end = first + kSampleBlock < count ? first + kSampleBlock : count;
    Vec top = v_set(-__builtin_inff()), sum = v_zero();
    int64_t i = first;
    for (; i + kLanes <= end; i += kLanes) {
      const Vec scaled = v_div(v_sub(v_load(x + i), shift), divisor), weight = v_exp(scaled);
      v_store(y + i, scaled);
      v_store(w + i, weight);
      top = v_max(top, scaled);
      sum = v_add(sum, weight);
    }
    float highest = v_max_lane(top);
    double mass = fold_sum(v_fold(sum));
    if (i < end) {
      v_store_n(y + i, v_div(v_sub(v_load_n(x + i, end - i), shift), divisor), end - i);
      v_store_n(w + i, v_exp(v_load_n(y + i, end - i)), end - i);
      for (; i < end; ++i) {
        highest = y[i] > highest ? y[i] : highest;
        mass += w[i];
      }
    }
    block_best[first / kSampleBlock] = highest;
    block_mass[first / kSampleBlock] = mass;
  }
}
