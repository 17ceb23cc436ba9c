// Integer activations times int8 and int4 panels. Included inside an anonymous namespace.
//
// Within 64 k (one activation block; 32 for int4 of group 32) products are summed exactly in int32; each block then adds
// scale * integer to a float sum, blocks in order. So a row does not depend on how many rows there are, and AVX2 and
// AVX-512 give the same bits. K blocks and row tiles serve the caches, as in matmul_kernels.h.

#ifdef __AVX512F__
static constexpr int kIntegerTile = 6, kIntegerPanels = 2;
#else
static constexpr int kIntegerTile = 2, kIntegerPanels = 1;
#endif
static constexpr int64_t kIntegerChunk = 48, kIntegerBlockBytes = 8192;

struct IntegerTile {
  const char* rows[kIntegerTile];
  int64_t low, scales, row_sums;     // offsets in a row
  const char* panels;
  int64_t panel_stride, header, zeros;
  int group_shift;                   // int4: scale group of block b is b >> group_shift
  int64_t first_block, end_block;    // of 64 k
  float* sums;                       // [rows][panels * 32], carried between K blocks
  bool streams;                      // the only tile: it prefetches as it goes, kStreamAhead from what it reads
  const char* next;                  // the panels that are read after these
  int64_t prefetch;                  // else how far ahead of what is read to prefetch, bytes
  int64_t first_line, end_line;      // and which lines of each block, of all panels together
};

// What a tile is specialised for. Span: how many k share a pair of scales, and one int32 sum.
template <int KIND, int SPAN, bool ZEROS>
struct IntegerFormat {
  static constexpr int kKind = KIND, kSpan = SPAN;
  static constexpr bool kZeros = ZEROS;
  static constexpr int kLineK = KIND == kInt4 ? 8 : 4;                  // k per line
  static constexpr int64_t kBlockBytes = kRowBlock / kLineK * 128;      // one panel, 64 k
  static constexpr int kZeroPoint = KIND == kInt4 ? 8 : 128;
};

static inline int32_t load_four(const char* p) {  // four int8 activations
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return four;
}

// The sum of a row's integers over span `part` of block `block`.
template <class F>
static inline int32_t span_sum(const IntegerTile& t, int r, int64_t block, int part) {
  const int32_t* sums = (const int32_t*)(t.rows[r] + t.row_sums) + 2 * block;
  return F::kSpan == 32 ? sums[part] : sums[0] + sums[1];
}

template <class F>
static inline int64_t scale_group(const IntegerTile& t, int64_t block, int part) {
  return F::kSpan == 32 ? 2 * block + part : block >> t.group_shift;
}

// Where the block lies that one tile alone reads kStreamAhead after `block` of panel p, in these panels or the next
// ones, whose header comes along.
template <class F, int P>
static inline const char* stream_ahead(const IntegerTile& t, int64_t block, int p) {
  static_assert(kStreamAhead % F::kBlockBytes == 0, "a block is ahead as a whole");
  const int64_t beyond = t.header + block * F::kBlockBytes + kStreamAhead - t.panel_stride;
  if (beyond < 0) return t.panels + (p + 1) * t.panel_stride + beyond;
  const char* next = t.next + p * t.panel_stride;
  if (beyond == 0) {
    for (int64_t i = 0; i < t.header; i += 64) _mm_prefetch(next + i, _MM_HINT_T0);
  }
  return next + t.header + beyond;
}

// This tile's share of what several tiles will read next.
template <class F>
static inline void prefetch_share(const IntegerTile& t, int64_t block) {
  constexpr int64_t lines = F::kBlockBytes / 64;
  for (int64_t i = t.first_line; i < t.end_line; ++i) {
    const char* panel = t.panels + (i >= lines ? t.panel_stride : 0) + t.header;
    _mm_prefetch(panel + block * F::kBlockBytes + (i >= lines ? i - lines : i) * 64 + t.prefetch, _MM_HINT_T0);
  }
}

#ifdef __AVX512F__
#include "matmul_integer_avx512.h"
#else
#include "matmul_integer_avx2.h"
#endif

template <class F, int PLANES, int P>
static void integer_rows(const IntegerTile& t, int64_t rows) {
  switch (rows) {
    case 1: return multiply_integer<F, PLANES, 1, P>(t);
    case 2: return multiply_integer<F, PLANES, 2, P>(t);
#ifdef __AVX512F__
    case 3: return multiply_integer<F, PLANES, 3, P>(t);
    case 4: return multiply_integer<F, PLANES, PLANES == 2 ? 3 : 4, P>(t);
    case 5: return multiply_integer<F, PLANES, PLANES == 2 ? 3 : 5, P>(t);
    case 6: return multiply_integer<F, PLANES, PLANES == 2 ? 3 : 6, P>(t);
#endif
  }
}

// sums[row][P * 32] of one chunk of rows over the whole K, without the columns' own scales.
template <class F, int P>
static void integer_chunk(const MatmulArgs& a, int64_t first_row, int64_t num_rows, int64_t panel, float* sums) {
  IntegerTile t = {};
  const int planes = (int)row_planes(a.row_type);
  t.low = round_up(a.k, kRowBlock);
  t.scales = row_scales_offset(a.k, a.row_type);
  t.row_sums = row_sums_offset(a.k, a.row_type);
  t.panels = a.panels + panel * a.panel_stride;
  t.panel_stride = a.panel_stride;
  t.header = header_bytes(a.k, a.format);
  t.zeros = zeros_offset(a.k, a.format);
  t.group_shift = format_group(a.format) == 128 ? 1 : 0;
  const int64_t tile_rows = planes == 2 ? kIntegerTile / 2 : kIntegerTile;
  const int64_t tiles = (num_rows + tile_rows - 1) / tile_rows, blocks = round_up(a.k, kRowBlock) / kRowBlock;
  const int64_t at_once = tiles > 1 ? kIntegerBlockBytes / (P * F::kBlockBytes) : blocks;
  const int64_t lines = P * F::kBlockBytes / 64;  // of a block
  t.streams = tiles == 1;
  t.next = panel + P < a.num_panels || !a.next ? t.panels + P * a.panel_stride : a.next;
  for (int64_t b = 0; b < blocks; b += at_once) {
    t.first_block = b;
    t.end_block = b + at_once < blocks ? b + at_once : blocks;
    // Several tiles share the following K block, or the first of the next panels.
    t.prefetch = t.end_block < blocks ? at_once * F::kBlockBytes : P * a.panel_stride - b * F::kBlockBytes;
    int64_t row = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t end = num_rows * (tile + 1) / tiles;
      for (int64_t r = row; r < end; ++r) {
        const int64_t index = a.row_index ? a.row_index[first_row + r] : first_row + r;
        t.rows[r - row] = a.rows + index * a.row_stride;
      }
      t.sums = sums + row * P * kPanelColumns;
      t.first_line = lines * tile / tiles;
      t.end_line = lines * (tile + 1) / tiles;
      if (planes == 2) integer_rows<F, 2, P>(t, end - row);
      else integer_rows<F, 1, P>(t, end - row);
      row = end;
    }
  }
}

template <int P>
static void store_scaled(const MatmulArgs& a, int64_t row, int64_t panel, const float* sums) {
  for (int64_t p = 0; p < P; ++p) {
    const int64_t column = (panel + p) * kPanelColumns, left = a.num_columns - column;
    const float* scale = (const float*)(a.panels + (panel + p) * a.panel_stride);
    float* out = (float*)((char*)a.out + row * a.out_stride) + column;
    for (int64_t i = 0; i < kPanelColumns && i < left; i += kLanes) {
      const int64_t n = left - i < kLanes ? left - i : kLanes;
      Vec x = v_mul(v_load(sums + p * kPanelColumns + i), v_load(scale + i));
      if (a.bias) x = v_add(x, v_load_n(a.bias + column + i, n));
      if (n < kLanes) v_store_n(out + i, x, n);
      else v_store(out + i, x);
    }
  }
}

template <class F, int P>
static void integer_panels(const MatmulArgs& a, int64_t row, int64_t rows, int64_t panel, float* sums) {
  integer_chunk<F, P>(a, row, rows, panel, sums);
  for (int64_t r = 0; r < rows; ++r) store_scaled<P>(a, row + r, panel, sums + r * P * kPanelColumns);
}

template <class F>
static void integer_matmul(const MatmulArgs& a) {
  alignas(64) float sums[kIntegerChunk * kIntegerPanels * kPanelColumns];
  for (int64_t row = 0; row < a.num_rows; row += kIntegerChunk) {
    const int64_t rows = a.num_rows - row < kIntegerChunk ? a.num_rows - row : kIntegerChunk;
    int64_t panel = 0;
    for (; panel + kIntegerPanels <= a.num_panels; panel += kIntegerPanels) {
      integer_panels<F, kIntegerPanels>(a, row, rows, panel, sums);
    }
    for (; panel < a.num_panels; ++panel) integer_panels<F, 1>(a, row, rows, panel, sums);
  }
}

// Sixteen hidden columns of one row: SiLU(gate) * up.
static void hidden_columns(const char* panel, const float* sums, float* out) {
  const float* scale = (const float*)panel;
  for (int64_t i = 0; i < kTileColumns; i += kLanes) {
    const Vec gate = v_mul(v_load(sums + i), v_load(scale + i));
    const Vec up = v_mul(v_load(sums + kTileColumns + i), v_load(scale + kTileColumns + i));
    v_store(out + i, v_silu_mul(gate, up));
  }
}

// Four panels make one block of 64 hidden columns, which is quantised while it is here.
template <class F>
static void integer_gate_up(const MatmulArgs& a) {
  constexpr int64_t kQuad = kRowBlock / kTileColumns;
  alignas(64) float sums[kQuad * kIntegerChunk * kPanelColumns], hidden[kRowBlock];
  for (int64_t row = 0; row < a.num_rows; row += kIntegerChunk) {
    const int64_t rows = a.num_rows - row < kIntegerChunk ? a.num_rows - row : kIntegerChunk;
    for (int64_t first = 0; first < a.num_panels; first += kQuad) {
      const int64_t panels = a.num_panels - first < kQuad ? a.num_panels - first : kQuad;
      int64_t p = 0;  // [panel groups][rows][panels of the group * 32]
      for (; p + kIntegerPanels <= panels; p += kIntegerPanels) {
        integer_chunk<F, kIntegerPanels>(a, row, rows, first + p, sums + p * rows * kPanelColumns);
      }
      const int64_t wide = p;
      for (; p < panels; ++p) integer_chunk<F, 1>(a, row, rows, first + p, sums + p * rows * kPanelColumns);
      for (int64_t r = 0; r < rows; ++r) {
        for (p = 0; p < panels; ++p) {
          const int64_t width = p < wide ? kIntegerPanels : 1, group = p / width * width;
          const float* own = sums + (group * rows + r * width + p - group) * kPanelColumns;
          hidden_columns(a.panels + (first + p) * a.panel_stride, own, hidden + p * kTileColumns);
        }
        write_row(hidden, (char*)a.out + (row + r) * a.out_stride, a.first_hidden + first * kTileColumns,
                  panels * kTileColumns, a.hidden, kRowInt16);
      }
    }
  }
}

template <bool GATE_UP, class F>
static void integer_run(const MatmulArgs& a) {
  if (GATE_UP) integer_gate_up<F>(a);
  else integer_matmul<F>(a);
}

template <bool GATE_UP>
static void integer(const MatmulArgs* a) {
  if (format_kind(a->format) == kInt8) return integer_run<GATE_UP, IntegerFormat<kInt8, 64, false>>(*a);
  const bool zeros = format_zeros(a->format);
  if (format_group(a->format) == 32) {
    if (zeros) return integer_run<GATE_UP, IntegerFormat<kInt4, 32, true>>(*a);
    return integer_run<GATE_UP, IntegerFormat<kInt4, 32, false>>(*a);
  }
  if (zeros) return integer_run<GATE_UP, IntegerFormat<kInt4, 64, true>>(*a);
  integer_run<GATE_UP, IntegerFormat<kInt4, 64, false>>(*a);
}

static void matmul_integer(const MatmulArgs* a) { integer<false>(a); }
static void gate_up_integer(const MatmulArgs* a) { integer<true>(a); }
