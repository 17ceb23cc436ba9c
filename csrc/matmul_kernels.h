// Activations times packed panels, written once over a Weights policy. Included inside an anonymous namespace.
//
// The promise: every output element is one chain of multiply-adds over k, from the first group to the last, in one
// accumulator. Register tiles, K blocks and row chunks only decide when a link of the chain is computed, never its
// order, so an output row does not depend on how many rows there are or where it stands among them.
//
// Traffic: a K block of two panels (16 KB) is read from memory once, multiplied with every row of the chunk out of
// L1, while the next block is prefetched a few lines per step. With one row block there is nothing to reuse: the
// whole K runs in registers and the weights just stream.

struct WeightsF32 {
  static constexpr int kSteps = 1, kLineBytes = kLanes * 4, kRow = kRowFloat32;
  static inline Vec load(const char* p, int) { return v_load((const float*)p); }
  static inline Vec broadcast(const char* row, int64_t group, int) { return v_set(((const float*)row)[group]); }
  static inline Vec mul_add(Vec sum, Vec a, Vec b) { return v_fma(a, b, sum); }
};

struct WeightsF16 {
  static constexpr int kSteps = 1, kLineBytes = kLanes * 2, kRow = kRowFloat32;
  static inline Vec load(const char* p, int) { return v_load_f16((const uint16_t*)p); }
  static inline Vec broadcast(const char* row, int64_t group, int) { return v_set(((const float*)row)[group]); }
  static inline Vec mul_add(Vec sum, Vec a, Vec b) { return v_fma(a, b, sum); }
};

// bf16 weights, float activations: both halves of each pair are widened in registers.
struct WeightsBF16Wide {
  static constexpr int kSteps = 2, kLineBytes = kLanes * 4, kRow = kRowFloat32;
  static inline Vec load(const char* p, int step) { return step ? v_pair_odd(p) : v_pair_even(p); }
  static inline Vec broadcast(const char* row, int64_t group, int step) {
    return v_set(((const float*)row)[2 * group + step]);
  }
  static inline Vec mul_add(Vec sum, Vec a, Vec b) { return v_fma(a, b, sum); }
};

static constexpr int kPanelVectors = kPanelColumns / kLanes;
static constexpr int kWidePanels = kVectorRegisters == 32 ? 2 : 1;  // panels side by side
static constexpr int kRowTile = kVectorRegisters == 32 ? 6 : 3;     // 6 x 4 accumulators of 32 registers, 3 x 4 of 16
static constexpr int64_t kRowChunk = 96;                            // its activations stay in L2, its sums in L1
static constexpr int64_t kBlockGroups = 512;
static constexpr int64_t kStreamAhead = 2048;                       // bytes; hardware prefetch stops at page ends

struct Tile {
  const char* rows[kRowTile];
  const char* panels;
  int64_t panel_stride;
  int64_t first_group, end_group;
  float* sums;              // [rows][panels * 32], carried between K blocks
  const char* prefetch[2];  // this tile's share of the lines to bring in while it computes
};

// R rows times P panels; L lines are prefetched per group: of one panel, or half of them of each of two.
template <class W, int R, int P, int L>
static void multiply_tile(const Tile& t) {
  constexpr int N = P * kPanelVectors;
  constexpr int64_t group_bytes = W::kLineBytes * kPanelVectors;
  constexpr int streams = L > group_bytes / 64 ? 2 : 1;
  Vec sum[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[r][n] = t.first_group ? v_load(t.sums + (r * N + n) * kLanes) : v_zero();
  }
  const char* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = t.rows[r];
  const char* panels[P];
  for (int p = 0; p < P; ++p) panels[p] = t.panels + p * t.panel_stride;
  const char* prefetch[2] = {t.prefetch[0], t.prefetch[1]};

  for (int64_t g = t.first_group; g < t.end_group; ++g) {
    const int64_t at = g * group_bytes;
#pragma GCC unroll 4
    for (int line = 0; line < L; ++line) {
      _mm_prefetch(prefetch[line / (L / streams)] + at + line % (L / streams) * 64, L == 4 ? _MM_HINT_T0 : _MM_HINT_T1);
    }
#pragma GCC unroll 2
    for (int step = 0; step < W::kSteps; ++step) {
      if (kVectorRegisters == 32) {  // hold the weights, broadcast row after row
        Vec b[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) b[n] = W::load(panels[n / kPanelVectors] + at + n % kPanelVectors * W::kLineBytes, step);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vec a = W::broadcast(rows[r], g, step);
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) sum[r][n] = W::mul_add(sum[r][n], a, b[n]);
        }
      } else {  // 12 sums leave four registers: hold three rows, load weight after weight
        Vec a[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) a[r] = W::broadcast(rows[r], g, step);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          const Vec b = W::load(panels[n / kPanelVectors] + at + n % kPanelVectors * W::kLineBytes, step);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sum[r][n] = W::mul_add(sum[r][n], a[r], b);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) v_store(t.sums + (r * N + n) * kLanes, sum[r][n]);
  }
}

template <class W, int P, int L>
static void multiply_rows(const Tile& t, int64_t rows) {
  switch (rows) {
    case 1: return multiply_tile<W, 1, P, L>(t);
    case 2: return multiply_tile<W, 2, P, L>(t);
    case 3: return multiply_tile<W, 3, P, L>(t);
#ifdef __AVX512F__
    case 4: return multiply_tile<W, 4, P, L>(t);
    case 5: return multiply_tile<W, 5, P, L>(t);
    case 6: return multiply_tile<W, 6, P, L>(t);
#endif
  }
}

// sums[row][P * 32] of one chunk of rows over the whole K.
template <class W, int P>
static void multiply_chunk(const MatmulArgs& args, int64_t first_row, int64_t num_rows, int64_t panel, float* sums) {
  constexpr int64_t group_bytes = W::kLineBytes * kPanelVectors;
  constexpr int64_t panel_lines = group_bytes / 64, lines = P * panel_lines;  // per group
  const int64_t num_groups = round_up(args.k, group_size(args.format)) / group_size(args.format);
  Tile t = {};
  t.panels = args.panels + panel * args.panel_stride;
  t.panel_stride = args.panel_stride;
  const int64_t tiles = (num_rows + kRowTile - 1) / kRowTile;
  const int64_t share = tiles == 1 ? lines : tiles < 4 && lines == 4 ? 2 : 1;  // lines per group and tile
  const int64_t block = tiles > 1 ? kBlockGroups : num_groups;
  for (int64_t g = 0; g < num_groups; g += block) {
    t.first_group = g;
    t.end_group = g + block < num_groups ? g + block : num_groups;
    // Prefetch what comes next, as an offset from what is being read: the following K block, or the first block of
    // this task's next panels. A single tile streams: it runs a fixed distance ahead.
    const int64_t next = tiles == 1                         ? kStreamAhead
                         : t.end_group < num_groups ? (t.end_group - g) * group_bytes
                                                            : P * args.panel_stride - g * group_bytes;
    int64_t row = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      // Rows are shared out evenly, so that 32 rows become 6 6 5 5 5 5 and not 6 6 6 6 6 2.
      const int64_t end = num_rows * (tile + 1) / tiles;
      for (int64_t r = row; r < end; ++r) {
        const int64_t index = args.row_index ? args.row_index[first_row + r] : first_row + r;
        t.rows[r - row] = args.rows + index * args.row_stride;
      }
      t.sums = sums + row * P * kPanelColumns;
      const int64_t line = tile * share;  // the first of this tile's lines in each group
      t.prefetch[0] = t.panels + line / panel_lines * args.panel_stride + line % panel_lines * 64 + next;
      t.prefetch[1] = t.panels + args.panel_stride + next;
      if (line >= lines) multiply_rows<W, P, 0>(t, end - row);
      else if (share == 1) multiply_rows<W, P, 1>(t, end - row);
      else if (share == 2) multiply_rows<W, P, 2>(t, end - row);
      else if (P == 2) multiply_rows<W, P, 4>(t, end - row);
      row = end;
    }
  }
}

static void store_plain(const MatmulArgs& args, int64_t row, int64_t panel, const float* sums, int64_t width) {
  const int64_t column = panel * kPanelColumns;
  const int64_t count = args.num_columns - column < width ? args.num_columns - column : width;
  float* out = (float*)((char*)args.out + row * args.out_stride) + column;
  const float* bias = args.bias ? args.bias + column : nullptr;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec x = v_load(sums + i);
    v_store(out + i, bias ? v_add(x, v_load(bias + i)) : x);
  }
  const int64_t rest = count - i;
  if (rest > 0) v_store_n(out + i, bias ? v_add(v_load(sums + i), v_load_n(bias + i, rest)) : v_load(sums + i), rest);
}

template <class W>
static void store_gate_up(const MatmulArgs& args, int64_t row, int64_t panel, const float* sums, int64_t width) {
  char* out = (char*)args.out + row * args.out_stride + args.first_hidden * element_size(W::kRow);
  for (int64_t p = 0; p < width / kPanelColumns; ++p) {
    for (int64_t i = 0; i < kTileColumns; i += kLanes) {
      const float* gate = sums + p * kPanelColumns + i;
      const Vec h = v_silu_mul(v_load(gate), v_load(gate + kTileColumns));
      const int64_t column = (panel + p) * kTileColumns + i;
      if (W::kRow == kRowBFloat16) v_store_bf16((uint16_t*)out + column, h);
      else v_store((float*)out + column, h);
    }
  }
}

template <class W, bool GATE_UP, int P>
static void matmul_panels(const MatmulArgs& args, int64_t first_row, int64_t num_rows, int64_t panel, float* sums) {
  multiply_chunk<W, P>(args, first_row, num_rows, panel, sums);
  for (int64_t r = 0; r < num_rows; ++r) {
    const float* row = sums + r * P * kPanelColumns;
    if (GATE_UP) store_gate_up<W>(args, first_row + r, panel, row, P * kPanelColumns);
    else store_plain(args, first_row + r, panel, row, P * kPanelColumns);
  }
}

template <class W, bool GATE_UP>
static void matmul(const MatmulArgs* args) {
  alignas(64) float sums[kRowChunk * kWidePanels * kPanelColumns];
  for (int64_t row = 0; row < args->num_rows; row += kRowChunk) {
    const int64_t rows = args->num_rows - row < kRowChunk ? args->num_rows - row : kRowChunk;
    int64_t panel = 0;
    for (; panel + kWidePanels <= args->num_panels; panel += kWidePanels) {
      matmul_panels<W, GATE_UP, kWidePanels>(*args, row, rows, panel, sums);
    }
    for (; panel < args->num_panels; ++panel) matmul_panels<W, GATE_UP, 1>(*args, row, rows, panel, sums);
  }
}
