// bf16 activations times packed panels on AMX tiles. Included inside an anonymous namespace.
//
// The promise of matmul_kernels.h holds: an output element is one chain over k in steps of 32, whatever the number of
// rows. Up to 16 rows are one row tile against two panels (1 x 4 accumulators, tiles of exactly that many rows). More
// are taken 32 at a time against one panel (2 x 2); the last row tiles then begin earlier and compute a few rows twice,
// to the same bits, so that all tiles are full and one configuration serves. Four accumulators in either case: the
// latency of TDPBF16PS is more than three times its 16 cycles.
//
// Traffic: a K block of 256 k of a panel (128 k of two) is 16 KB of bf16, which stay in L1 while every row tile of the
// chunk passes by; the rows come from L2, at 32 bytes per cycle of the 48 it gives. Sums travel from K block to K block
// through memory in L1. Integer weights become such a block in a buffer, once per (chunk, panel): vector instructions
// make the next block while the tiles multiply this one, step by step, so that neither waits for the other and memory is
// asked for at an even pace (panels_amx.h).

static constexpr int64_t kStepK = 32, kStepBytes = kStepK * kPanelColumns * 2;  // of one panel, per TDPBF16PS
static constexpr int64_t kTileRows = 16, kTileBytes = 1024;
template <int A>
static constexpr int64_t kBlockSteps = 4 * A;  // of 32 k, for A row tiles at once
static constexpr int64_t kTileChunk = 192;               // rows whose sums of one panel stay in L1
static constexpr int64_t kMaxRowTiles = kTileChunk / kTileRows;
static constexpr int64_t kGatherBytes = 768 << 10;       // half of L2 at most: 192 rows of 2048 k
static constexpr int64_t kTileAhead = 4096;              // bytes of a panel that is read once

// Activation rows [first, first + num_rows) as tile loads find them.
struct RowTiles {
  int64_t first, num_rows, steps;    // steps: of 32 k
  const char* tile[kMaxRowTiles];    // the first row of each tile
  int64_t stride, step;              // bytes from row to row, and from 32 k to the next
  const char* last;                  // the last 32 k of every tile, [tile][16][64 bytes], where k is no multiple of 32
};

static inline int64_t num_row_tiles(int64_t num_rows) {
  return num_rows <= kTileRows ? 1 : round_up(num_rows, 2 * kTileRows) / kTileRows;
}
static inline int64_t tile_first_row(const RowTiles& rows, int64_t tile) {
  const int64_t last = rows.num_rows > kTileRows ? rows.num_rows - kTileRows : 0;
  return tile * kTileRows < last ? tile * kTileRows : last;
}

static inline const char* row_address(const MatmulArgs& a, int64_t row) {
  return a.rows + (a.row_index ? a.row_index[row] : row) * a.row_stride;
}

// k of a row from `first` on, 32 of them, zeros behind its end.
static inline void copy_step(const char* row, int64_t first, int64_t k, char* to) {
  const int64_t n = k - first < kStepK ? k - first : kStepK;
  _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), row + 2 * first));
}

// Rows that do not lie at one distance from each other are copied tile by tile, once per task of up to 16 panels: a few
// percent of their multiplication. All others (a single row, two rows, the down projection) are read where they are.
static bool evenly_spaced(const MatmulArgs& a, int64_t first, int64_t num_rows) {
  if (!a.row_index) return true;
  for (int64_t r = first + 2; r < first + num_rows; ++r) {
    if (a.row_index[r] - a.row_index[r - 1] != a.row_index[first + 1] - a.row_index[first]) return false;
  }
  return true;
}

static void place_rows(const MatmulArgs& a, char* last, RowTiles* rows) {
  rows->stride = rows->num_rows > 1 ? row_address(a, rows->first + 1) - row_address(a, rows->first) : 0;
  rows->step = kStepK * 2;
  rows->last = a.k % kStepK ? last : nullptr;
  for (int64_t t = 0; t < num_row_tiles(rows->num_rows); ++t) {
    const int64_t first = rows->first + tile_first_row(*rows, t);
    rows->tile[t] = row_address(a, first);
    if (!rows->last) continue;
    for (int64_t r = 0; r < kTileRows && r < rows->num_rows; ++r) {
      copy_step(row_address(a, first + r), (rows->steps - 1) * kStepK, a.k, last + t * kTileBytes + r * kStepK * 2);
    }
  }
}

static void gather_rows(const MatmulArgs& a, char* gathered, RowTiles* rows) {
  rows->stride = kStepK * 2;
  rows->step = kTileBytes;
  rows->last = nullptr;
  for (int64_t t = 0; t < num_row_tiles(rows->num_rows); ++t) {
    const int64_t first = tile_first_row(*rows, t);
    if (t > 0 && first == tile_first_row(*rows, t - 1)) {
      rows->tile[t] = rows->tile[t - 1];
      continue;
    }
    char* tile = gathered + t * rows->steps * kTileBytes;
    rows->tile[t] = tile;
    for (int64_t r = 0; r < kTileRows && r < rows->num_rows; ++r) {
      const char* row = row_address(a, rows->first + first + r);
      for (int64_t s = 0; s < rows->steps; ++s) copy_step(row, s * kStepK, a.k, tile + s * kTileBytes + r * kStepK * 2);
    }
  }
}

// Tile registers. A tiles of rows times P panels accumulate in 0 to 3: tile a, column tile n in a * 2P + n.
template <int A, int P, int N>
static inline void dot_column(const char* panel) {
  constexpr int b = A == 2 ? 6 + N : 5 + N % 3;
  tile_load<b, N % 2 * 64>(panel, 128);
  tile_dot_bf16<N, 4, b>();
  if constexpr (A == 2) tile_dot_bf16<2 * P + N, 5, b>();
}

template <int A, int P>
static inline void dot_step(const char* row0, const char* row1, int64_t stride, const char* panel0, const char* panel1) {
  tile_load<4>(row0, stride);
  if constexpr (A == 2) tile_load<5>(row1, stride);
  dot_column<A, P, 0>(panel0);
  dot_column<A, P, 1>(panel0);
  if constexpr (P == 2) {
    dot_column<A, P, 2>(panel1);
    dot_column<A, P, 3>(panel1);
  }
}

// Steps [first, end) of row tiles [tile, tile + A). `panel` is step `first` of the first panel as bf16, the second lies
// `distance` behind it.
template <int A, int P, class W>
static inline void dot_steps(const RowTiles& rows, int64_t tile, int64_t first, int64_t end, const char* panel,
                             int64_t distance, W& weights) {
  const int64_t stride = rows.stride, step = rows.step, whole = rows.last && end == rows.steps ? end - 1 : end;
  const char *row0 = rows.tile[tile] + first * step, *row1 = A == 2 ? rows.tile[tile + 1] + first * step : nullptr;
  for (int64_t s = first; s < whole; ++s) {
    weights.bring_next(s, tile / A);
    dot_step<A, P>(row0, row1, stride, panel, panel + distance);
    row0 += step;
    row1 += step;
    panel += kStepBytes;
  }
  if (whole < end) {  // the last of all: nothing comes next
    const char* last = rows.last + tile * kTileBytes;
    dot_step<A, P>(last, last + kTileBytes, kStepK * 2, panel, panel + distance);
  }
}

// The accumulators <-> [panel][A * 16 rows][32 columns] of float32.
enum class Move { kZero, kLoad, kStore };

template <int A, int P, Move MOVE, int C = 0>
static inline void move_sums(float* sums) {
  constexpr int a = C / (2 * P), n = C % (2 * P);
  float* at = sums + ((n / 2 * A + a) * kTileRows) * kPanelColumns + n % 2 * kTileColumns;
  if constexpr (MOVE == Move::kZero) tile_zero<C>();
  if constexpr (MOVE == Move::kLoad) tile_load<C>(at, kPanelColumns * 4);
  if constexpr (MOVE == Move::kStore) tile_store<C>(at, kPanelColumns * 4);
  if constexpr (C + 1 < A * 2 * P) move_sums<A, P, MOVE, C + 1>(sums);
}

template <int A, int P>
static constexpr int64_t kSumsOf = A * P * kTileRows * kPanelColumns;  // floats of one row block

#include "panels_amx.h"

// sums[row block][panel][A * 16 rows][32] over the whole K, without the columns' own scales.
template <template <int, int> class Weights, int A, int P>
static void multiply_row_tiles(const MatmulArgs& args, const RowTiles& rows, int64_t panel, float* sums) {
  using W = Weights<A, P>;
  const int64_t row_blocks = num_row_tiles(rows.num_rows) / A;
  W weights(args, panel, row_blocks);
  GroupSums<A, P> groups;
  const bool alone = row_blocks == 1;  // its sums then stay in the tiles
  for (int64_t first = 0; first < rows.steps; first += kBlockSteps<A>) {
    const int64_t end = first + kBlockSteps<A> < rows.steps ? first + kBlockSteps<A> : rows.steps;
    const char* block = weights.block(first);
    for (int64_t i = 0; i < row_blocks; ++i) {
      float* own = sums + i * kSumsOf<A, P>;
      if constexpr (W::kGrouped) {
        for (int64_t s = first; s < end; s += weights.group_steps()) {
          const int64_t group_end = s + weights.group_steps() < end ? s + weights.group_steps() : end;
          move_sums<A, P, Move::kZero>(nullptr);
          dot_steps<A, P>(rows, i * A, s, group_end, block + (s - first) * kStepBytes, weights.distance(), weights);
          groups.add_pending();
          move_sums<A, P, Move::kStore>(groups.next(own, weights, s, rows.num_rows));
        }
      } else {
        if (first == 0) move_sums<A, P, Move::kZero>(nullptr);
        else if (!alone) move_sums<A, P, Move::kLoad>(own);
        dot_steps<A, P>(rows, i * A, first, end, block, weights.distance(), weights);
        if (!alone || end == rows.steps) move_sums<A, P, Move::kStore>(own);
      }
    }
  }
  groups.add_pending();
}

struct HiddenBF16 {
  static constexpr int kRow = kRowBFloat16;
};

template <template <int, int> class Weights, bool GATE_UP, int A, int P>
static void tile_panels(const MatmulArgs& args, const RowTiles& rows, int64_t panel, float* sums) {
  multiply_row_tiles<Weights, A, P>(args, rows, panel, sums);
  for (int64_t t = 0; t < num_row_tiles(rows.num_rows); ++t) {
    // Rows that an earlier tile has are not written again.
    const int64_t first = tile_first_row(rows, t);
    for (int64_t r = t * kTileRows; r < first + kTileRows && r < rows.num_rows; ++r) {
      for (int64_t p = 0; p < P; ++p) {
        float* own = sums + (t / A * P + p) * (kSumsOf<A, 1>) + (t % A * kTileRows + r - first) * kPanelColumns;
        Weights<A, P>::scale_columns(args, panel + p, own);
        if (GATE_UP) store_gate_up<HiddenBF16>(args, rows.first + r, panel + p, own, kPanelColumns);
        else store_plain(args, rows.first + r, panel + p, own, kPanelColumns);
      }
    }
  }
}

template <template <int, int> class Weights, bool GATE_UP>
static void tile_rows(const MatmulArgs& args, const RowTiles& rows) {
  alignas(64) float sums[kTileChunk * kPanelColumns];
  TileConfig config = {};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {  // 0 to 3 sums, 4 and 5 rows, 6 and 7 weights; one row tile: 4 rows, 5 to 7 weights
    const bool weights = t > (rows.num_rows > kTileRows ? 5 : 4);
    config.rows[t] = (uint8_t)(weights || rows.num_rows > kTileRows ? kTileRows : rows.num_rows);
    config.row_bytes[t] = 64;
  }
  tile_configure(config);
  int64_t panel = 0;
  if (rows.num_rows > kTileRows) {
    for (; panel < args.num_panels; ++panel) tile_panels<Weights, GATE_UP, 2, 1>(args, rows, panel, sums);
  } else {
    for (; panel + 2 <= args.num_panels; panel += 2) tile_panels<Weights, GATE_UP, 1, 2>(args, rows, panel, sums);
    if (panel < args.num_panels) tile_panels<Weights, GATE_UP, 1, 1>(args, rows, panel, sums);
  }
}

template <template <int, int> class Weights, bool GATE_UP>
static __attribute__((noinline)) void gathered_tile_rows(const MatmulArgs& args, RowTiles* rows) {
  alignas(64) char gathered[kGatherBytes];  // of the stack: used by the calls that need it, freed with them
  gather_rows(args, gathered, rows);
  tile_rows<Weights, GATE_UP>(args, *rows);
}

template <template <int, int> class Weights, bool GATE_UP>
static void tile_matmul(const MatmulArgs* args) {
  alignas(64) char last[kMaxRowTiles * kTileBytes];
  RowTiles rows;
  rows.steps = (args->k + kStepK - 1) / kStepK;
  // Rows at one distance per chunk: gathered ones must fit, and very long ones go two by two.
  int64_t most = kTileChunk;
  if (!evenly_spaced(*args, 0, args->num_rows)) {
    const int64_t fit = kGatherBytes / (rows.steps * kStepK * 2) / (2 * kTileRows) * (2 * kTileRows);
    most = fit == 0 ? 2 : fit < most ? fit : most;
  }
  const int64_t chunks = (args->num_rows + most - 1) / most;
  const int64_t each = most == 2 ? 2 : round_up((args->num_rows + chunks - 1) / (chunks ? chunks : 1), 2 * kTileRows);
  for (rows.first = 0; rows.first < args->num_rows; rows.first += each) {
    rows.num_rows = args->num_rows - rows.first < each ? args->num_rows - rows.first : each;
    if (evenly_spaced(*args, rows.first, rows.num_rows)) {
      place_rows(*args, last, &rows);
      tile_rows<Weights, GATE_UP>(*args, rows);
    } else {
      gathered_tile_rows<Weights, GATE_UP>(*args, &rows);
    }
  }
  tile_release();
}
