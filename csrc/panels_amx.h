// Weights as matmul_amx.h multiplies them: bf16 blocks of a panel, [k / 2][2 tiles][16 columns][2 k]. bf16 panels are
// that already; int8 and int4 codes are turned into exact bf16 integers in a buffer that stays in L1.
//
// int4's group scales are not multiplied into the block but into the sums: the accumulators are stored after each scale
// group, and while the tiles compute the next one, vector instructions add scale * products to the sums. Per 64 bytes of
// codes that leaves a shuffle, 3 shifts and 4 table lookups (5 cycles; 6 with zero points; int8: 5) where scaling every
// weight would take about 17: with few rows this is what decides. And the weights are those of the checkpoint, exactly.

// Panels [panel, panel + P) of a bf16 matrix.
template <int A, int P>
class PanelsBF16 {
 public:
  static constexpr bool kGrouped = false;
  PanelsBF16(const MatmulArgs& args, int64_t panel, int64_t row_blocks)
      : panels_(args.panels + panel * args.panel_stride), stride_(args.panel_stride),
        steps_((args.k + kStepK - 1) / kStepK), row_blocks_(row_blocks) {}

  // The K block that begins with step `first`, of the first panel, and how far behind it that of the second lies.
  const char* block(int64_t first) const { return panels_ + first * kStepBytes; }
  int64_t distance() const { return stride_; }

  // While row block `row_block` is multiplied with step s. A lone row block reads each line once and runs a fixed
  // distance ahead. Several share out the lines of the next K block, or of the first block of the next panel.
  void bring_next(int64_t s, int64_t row_block) const {
    constexpr int64_t lines = kStepBytes / 64;
    const char* panel = panels_ + s * kStepBytes;
    if (row_blocks_ == 1) {
      for (int p = 0; p < P; ++p) {
        for (int64_t i = 0; i < lines; ++i) _mm_prefetch(panel + p * stride_ + kTileAhead + i * 64, _MM_HINT_T0);
      }
      return;
    }
    const int64_t first = s / kBlockSteps<A> * kBlockSteps<A>;
    const bool last = first + kBlockSteps<A> >= steps_;
    panel += last ? P * stride_ - first * kStepBytes : kBlockSteps<A> * kStepBytes;
    const int64_t from = lines * row_block / row_blocks_, to = lines * (row_block + 1) / row_blocks_;
    for (int64_t i = from; i < to; ++i) _mm_prefetch(panel + i * 64, _MM_HINT_T1);
  }

  static void scale_columns(const MatmulArgs&, int64_t, float*) {}

 private:
  const char* panels_;
  int64_t stride_, steps_, row_blocks_;
};

// 64 bytes of int8: 16 columns x 4 k -> two rows of pairs. A code in the low bits of 2^23 is 2^23 + code, exactly.
static inline void widen_int8(const char* codes, char* to) {
  const __m512i magic = _mm512_set1_epi32(0x4b000000), line = _mm512_loadu_si512(codes);
  const __m512i second = _mm512_set1_epi32(1), third = _mm512_set1_epi32(2), fourth = _mm512_set1_epi32(3);
  constexpr __mmask64 kLow = 0x1111111111111111ull, kLowPair = 0x3333333333333333ull;
  const __m512i lanes = _mm512_set_epi32(12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0);
  const Vec zero = v_set(8388608.0f + 128);
  const __m512i k[4] = {_mm512_mask_mov_epi8(magic, kLow, line),
                        _mm512_mask_shuffle_epi8(magic, kLow, line, _mm512_add_epi32(lanes, second)),
                        _mm512_mask_shuffle_epi8(magic, kLow, line, _mm512_add_epi32(lanes, third)),
                        _mm512_mask_shuffle_epi8(magic, kLow, line, _mm512_add_epi32(lanes, fourth))};
  const __m512i high_half = _mm512_add_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(0x101)), _mm512_set1_epi32(0x302));
  for (int pair = 0; pair < 2; ++pair) {  // whole numbers up to 128: the upper half of the float is all of it
    const __m512i even = _mm512_castps_si512(v_sub(_mm512_castsi512_ps(k[2 * pair]), zero));
    const __m512i odd = _mm512_castps_si512(v_sub(_mm512_castsi512_ps(k[2 * pair + 1]), zero));
    _mm512_store_si512(to + pair * 128, _mm512_mask_shuffle_epi8(odd, kLowPair, even, high_half));
  }
}

// The table of a VPERMW: bf16 of 16 whole numbers from `first` on, then of 16 from `second` on.
static inline __m512i bf16_numbers(int first, int second) {
  const __m512i up = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i low = v_to_bf16(_mm512_cvtepi32_ps(_mm512_add_epi32(up, _mm512_set1_epi32(first))));
  const __m256i high = v_to_bf16(_mm512_cvtepi32_ps(_mm512_add_epi32(up, _mm512_set1_epi32(second))));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// 64 bytes of int4: 16 columns x 8 k -> four rows of pairs. VPERMW looks at 5 bits of each 16: a code and, without zero
// points, one bit of the next, for which the table is there twice. With them `shift` is 16 - zero in every byte.
template <bool ZEROS>
static inline void widen_int4(const char* codes, __m512i table, __m512i shift, char* to) {
  const __m512i swap = _mm512_set4_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200);  // bytes 0 2 1 3 of a column
  const __m512i line = _mm512_shuffle_epi8(_mm512_loadu_si512(codes), swap), nibble = _mm512_set1_epi8(15);
  __m512i low = line, high = _mm512_srli_epi16(line, 4);
  if (ZEROS) {
    low = _mm512_add_epi8(_mm512_and_si512(low, nibble), shift);
    high = _mm512_add_epi8(_mm512_and_si512(high, nibble), shift);
  }
  _mm512_store_si512(to, _mm512_permutexvar_epi16(low, table));
  _mm512_store_si512(to + 128, _mm512_permutexvar_epi16(_mm512_srli_epi16(low, 8), table));
  _mm512_store_si512(to + 256, _mm512_permutexvar_epi16(high, table));
  _mm512_store_si512(to + 384, _mm512_permutexvar_epi16(_mm512_srli_epi16(high, 8), table));
}

// Panels [panel, panel + P) of an int8 or int4 matrix, a K block at a time in one of two buffers.
template <int A, int P, int KIND, bool ZEROS>
class PanelsInteger {
 public:
  static constexpr bool kGrouped = KIND == kInt4;
  PanelsInteger(const MatmulArgs& args, int64_t panel, int64_t)
      : panels_(args.panels + panel * args.panel_stride), stride_(args.panel_stride),
        header_(header_bytes(args.k, args.format)), zeros_(zeros_offset(args.k, args.format)),
        group_shift_(format_group(args.format) / 64), steps_((args.k + kStepK - 1) / kStepK),
        table_(ZEROS ? bf16_numbers(-16, 0) : bf16_numbers(-8, -8)) {
    for (int64_t s = 0; s < kBlockSteps<A> && s < steps_; ++s) widen(s);
  }

  const char* block(int64_t first) const { return buffer_ + place(first); }
  int64_t distance() const { return kBlockSteps<A> * kStepBytes; }
  void bring_next(int64_t s, int64_t row_block) {
    if (row_block == 0 && s + kBlockSteps<A> < steps_) widen(s + kBlockSteps<A>);
  }

  // int4: 32 k that share a scale, and their 32 columns' scales.
  int64_t group_steps() const { return 1 << group_shift_; }
  const uint16_t* scales(int p, int64_t step) const {
    return (const uint16_t*)(panels_ + p * stride_ + kPanelColumns * 4) + (step >> group_shift_) * kPanelColumns;
  }

  static void scale_columns(const MatmulArgs& args, int64_t panel, float* sums) {
    const float* scale = (const float*)(args.panels + panel * args.panel_stride);
    v_store(sums, v_mul(v_load(sums), v_load(scale)));
    v_store(sums + kTileColumns, v_mul(v_load(sums + kTileColumns), v_load(scale + kTileColumns)));
  }

 private:
  static constexpr int64_t kCodeBytes = kStepK * kPanelColumns / (KIND == kInt4 ? 2 : 1);  // of a step

  // [block, even or odd][panel][step of the block]
  static int64_t place(int64_t s) {
    return (s / kBlockSteps<A> % 2 * P * kBlockSteps<A> + s % kBlockSteps<A>) * kStepBytes;
  }

  void widen(int64_t s) {
    constexpr int64_t kAhead = kTileAhead / kCodeBytes;  // steps
    for (int p = 0; p < P; ++p) {
      const char* panel = panels_ + p * stride_;
      // What will be widened some steps from now: of this panel, or of the one after these, and its header.
      const bool last = s + kAhead >= steps_;
      const char* next = panel + header_ + (s + kAhead) * kCodeBytes;
      if (last) next += P * stride_ - steps_ * kCodeBytes;
      if (s + kAhead == steps_) {
        for (int64_t i = 0; i < header_; i += 64) _mm_prefetch(panel + P * stride_ + i, _MM_HINT_T0);
      }
      widen_step(panel, s, next, buffer_ + place(s) + p * distance());
    }
  }

  void widen_step(const char* panel, int64_t s, const char* next, char* to) const {
    const char* codes = panel + header_ + s * kCodeBytes;
    const __m512i table = table_;  // what is stored below could, for all the compiler knows, be this object
    for (int tile = 0; tile < 2; ++tile) {
      const __m512i shift = ZEROS ? zero_shift(panel, s, tile) : _mm512_setzero_si512();
      for (int64_t at = tile * 64; at < kCodeBytes; at += 128) {
        _mm_prefetch(next + at, _MM_HINT_T0);
        if (KIND == kInt8) widen_int8(codes + at, to + at / 128 * 256 + tile * 64);
        else widen_int4<ZEROS>(codes + at, table, shift, to + at / 128 * 512 + tile * 64);
      }
    }
  }

  __m512i zero_shift(const char* panel, int64_t s, int tile) const {
    const char* zeros = panel + zeros_ + (s >> group_shift_) * kPanelColumns + tile * kTileColumns;
    const __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)zeros));
    return _mm512_mullo_epi32(_mm512_sub_epi32(_mm512_set1_epi32(16), zero), _mm512_set1_epi32(0x01010101));
  }

  const char* panels_;
  int64_t stride_, header_, zeros_, group_shift_, steps_;  // a group is 32 << group_shift_ k
  __m512i table_;
  alignas(64) char buffer_[2 * P * kBlockSteps<A> * kStepBytes];
};

template <int A, int P>
using PanelsInt8 = PanelsInteger<A, P, kInt8, false>;
template <int A, int P>
using PanelsInt4 = PanelsInteger<A, P, kInt4, false>;
template <int A, int P>
using PanelsInt4Zeros = PanelsInteger<A, P, kInt4, true>;

// The products of one scale group, stored when the tiles have them, scaled into the sums one group later.
template <int A, int P>
class GroupSums {
 public:
  // Where the accumulators of the scale group at `step` go; they will be added to `sums`.
  template <class W>
  float* next(float* sums, const W& weights, int64_t step, int64_t num_rows) {
    sums_ = sums;
    rows_ = A == 1 ? num_rows : A * kTileRows;
    begin_ = step == 0;
    for (int p = 0; p < P; ++p) scales_[p] = weights.scales(p, step);
    at_ ^= 1;
    return products_[at_];
  }

  void add_pending() {
    if (!sums_) return;
    for (int p = 0; p < P; ++p) {
      const Vec low = v_load_f16(scales_[p]), high = v_load_f16(scales_[p] + kTileColumns);
      const float* from = products_[at_] + p * kSumsOf<A, 1>;
      float* to = sums_ + p * kSumsOf<A, 1>;
      for (int64_t i = 0; i < rows_ * kPanelColumns; i += kPanelColumns) {
        v_store(to + i, v_fma(v_load(from + i), low, begin_ ? v_zero() : v_load(to + i)));
        v_store(to + i + 16, v_fma(v_load(from + i + 16), high, begin_ ? v_zero() : v_load(to + i + 16)));
      }
    }
    sums_ = nullptr;
  }

 private:
  alignas(64) float products_[2][kSumsOf<A, P>];
  const uint16_t* scales_[P];
  float* sums_ = nullptr;
  int64_t rows_ = 0;
  int at_ = 0;
  bool begin_ = false;
};
