// What an instruction set can do at best, for machine_limits.cpp: one loop per arithmetic, registers only, and one that
// only reads. Included inside an anonymous namespace. In volatile asm, which the compiler can neither drop nor merge.

static constexpr int kChains = 12;  // independent sums: two instructions per cycle of four to six cycles' latency

static void peak_fma(int64_t rounds) {
  const Vec a = v_set(0.5f), b = v_set(1.0f);
  Vec sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = v_zero();
  for (; rounds > 0; --rounds) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) __asm__ volatile("vfmadd231ps %2, %1, %0" : "+v"(sum[i]) : "v"(a), "v"(b));
  }
}
#define MOE_PEAK_FMA {"vfmadd231ps", 2 * kLanes * kChains, peak_fma}

#ifdef __AVX512F__
static void peak_vpdpbusd(int64_t rounds) {
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  __m512i sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = _mm512_setzero_si512();
  for (; rounds > 0; --rounds) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sum[i]) : "v"(a), "v"(b));
  }
}
#define MOE_PEAK_INT8 {"vpdpbusd", 2 * 64 * kChains, peak_vpdpbusd}
#define MOE_PEAK_INT4 MOE_PEAK_INT8
#else
// Without VNNI products of bytes are added in pairs to int16, and these, before they overflow, to int32: after every
// product for 8 bits; for 4 bits so rarely that it does not count.
template <bool WIDEN>
static void peak_maddubs(int64_t rounds) {
  const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5), ones = _mm256_set1_epi16(1);
  __m256i sum[kChains / 2];
#pragma GCC unroll 12
  for (int i = 0; i < kChains / 2; ++i) sum[i] = _mm256_setzero_si256();
  for (; rounds > 0; --rounds) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      __m256i products;
      __asm__ volatile("vpmaddubsw %2, %1, %0" : "=x"(products) : "x"(a), "x"(b));
      if (WIDEN) __asm__ volatile("vpmaddwd %1, %0, %0" : "+x"(products) : "x"(ones));
      __m256i& s = sum[i % (kChains / 2)];
      if (WIDEN) __asm__ volatile("vpaddd %1, %0, %0" : "+x"(s) : "x"(products));
      else __asm__ volatile("vpaddw %1, %0, %0" : "+x"(s) : "x"(products));
    }
  }
}
#define MOE_PEAK_INT8 {"vpmaddubsw+vpmaddwd+vpaddd", 2 * 32 * kChains, peak_maddubs<true>}
#define MOE_PEAK_INT4 {"vpmaddubsw+vpaddw", 2 * 32 * kChains, peak_maddubs<false>}
#endif

#ifdef __AVX512BF16__
static void peak_vdpbf16ps(int64_t rounds) {
  const __m512 a = _mm512_castsi512_ps(_mm512_set1_epi16(0x3f00)), b = _mm512_castsi512_ps(_mm512_set1_epi16(0x3f80));
  __m512 sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = _mm512_setzero_ps();
  for (; rounds > 0; --rounds) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) __asm__ volatile("vdpbf16ps %2, %1, %0" : "+v"(sum[i]) : "v"(a), "v"(b));
  }
}
#define MOE_PEAK_BF16 {"vdpbf16ps", 2 * 32 * kChains, peak_vdpbf16ps}
#endif

#ifdef __AMX_BF16__
static void peak_tdpbf16ps(int64_t rounds) {  // leaves no tile configuration behind
  alignas(64) uint8_t config[64] = {1};       // palette 1; 8 tiles of 16 rows of 64 bytes, zeroed by loading this
  for (int tile = 0; tile < 8; ++tile) {
    config[16 + 2 * tile] = 64;
    config[48 + tile] = 16;
  }
  __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
  for (; rounds > 0; --rounds) {
    __asm__ volatile(
        "tdpbf16ps %tmm6, %tmm4, %tmm0\n\ttdpbf16ps %tmm7, %tmm4, %tmm1\n\t"
        "tdpbf16ps %tmm6, %tmm5, %tmm2\n\ttdpbf16ps %tmm7, %tmm5, %tmm3");
  }
  __asm__ volatile("tilerelease");
}
#define MOE_PEAK_TILES {"tdpbf16ps", 4 * 2 * 16 * 16 * 32, peak_tdpbf16ps}
#endif

// Every cache line of [data, data + bytes) into a register, prefetched 4 KB ahead.
static void read_memory(const char* data, int64_t bytes) {
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
#pragma GCC unroll 4
    for (int line = 0; line < 256; line += 64) _mm_prefetch(data + i + line + 4096, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int64_t j = 0; j < 256; j += kLanes * 4) __asm__ volatile("" : : "v"(v_load((const float*)(data + i + j))));
  }
}
