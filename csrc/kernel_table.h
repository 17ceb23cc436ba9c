// The one interface between the portable code and the per-ISA kernels: plain structs and a table of functions.
// Included by translation units compiled with different -m flags, so: no STL, no inline functions.
#pragma once
#include <stdint.h>

#include "cache_layout.h"
#include "layout.h"

// Rows are activations in the table's row type: row r starts at rows + (row_index ? row_index[r] : r) * row_stride.
struct MatmulArgs {
  const char* rows;
  int64_t row_stride;         // bytes
  int32_t row_type;           // integer weights: kRowInt8 or kRowInt16
  const int32_t* row_index;   // or null
  int64_t num_rows;
  const char* panels;         // first panel of this task
  int64_t panel_stride;       // bytes
  int64_t num_panels;
  const char* next;           // what will be read after them, or null: what lies behind them
  int32_t format;             // of the weights
  int64_t k;                  // the padding behind it is zeros
  void* out;                  // row r at out + r * out_stride; float for matmul, hidden row type for gate_up
  int64_t out_stride;         // bytes
  int64_t num_columns;        // matmul: columns of `out` to write, at most 32 per panel
  int64_t first_hidden;       // gate_up: the first of 16 columns per panel; a multiple of kRowBlock for integer rows
  int64_t hidden;             // gate_up: columns of a whole hidden row
  const float* bias;          // of the first column, or null; matmul only
};

static constexpr int64_t kSampleBlock = 256;
static constexpr int32_t kAttentionRows = 16, kAttentionPart = 256;

// Up to 16 (token, head) rows that read the same key head of the same sequence, over one part: at most 256 positions
// that start at a multiple of 256. The split into parts depends on absolute position alone.
struct AttentionPart {
  const char* query[kAttentionRows];       // bfloat16 where both row_dtype and attention_query are, else float32
  int32_t visible[kAttentionRows];        // how many positions of this part each row may see, 0 to num_keys
  int32_t num_rows;
  int32_t num_keys;
  const char* keys[kAttentionPart];
  const char* values[kAttentionPart];
  int32_t row_dtype;                      // of keys and values: float32 or bfloat16
  bool cold;                              // the keys have not been read just now: prefetch them
  int32_t key_dim;
  int32_t value_dim;
  float scale;
  // Results: row r's unnormalised softmax over this part. A row that sees nothing gets max = -inf, sum = 0, zeros.
  float* max;                             // [16]
  float* sum;                             // [16]
  float* out;                             // [16, value_dim]
};

// A loop of the arithmetic that some kernel is made of, registers only: peak_kernels.h.
struct Peak {
  const char* name;     // of its instructions
  int64_t operations;   // per round; a multiply-add is two
  void (*run)(int64_t rounds);
};

struct KernelTable {
  const char* name;
  // By kind of weight. The row type it is multiplied with: of a layer's input, and of the hidden row between gate/up
  // and down, whose heavy tails need more bits.
  int32_t input_rows[kNumKinds], hidden_rows[kNumKinds];
  void (*matmul[kNumKinds])(const MatmulArgs*);
  void (*gate_up[kNumKinds])(const MatmulArgs*);
  void (*convert)(const float* in, void* out, int64_t count, int32_t dtype);  // to a plain type
  // Columns [first, first + count) of a row of k columns in row type `type`; for integer rows `first` is a multiple of
  // kRowBlock, and the last block is filled up with zeros. A row with NaN or infinity gets NaN in its block's scale.
  void (*write_row)(const float* in, char* row, int64_t first, int64_t count, int64_t k, int32_t type);
  void (*rms_norm)(const float* x, const float* residual, const float* weight, float eps, int64_t dim,
                   float* out, float* total);
  void (*silu_mul)(const float* gate, const float* up, float* out, int64_t count);
  void (*weighted_sum)(const float* const* rows, const float* weights, int64_t num_rows, int64_t dim, float* out);
  float (*largest)(const float* x, int64_t count);  // -inf of none
  // y = (x - best) / temperature and exp(y); of each block of kSampleBlock the largest y and the sum of the rest.
  void (*exponentials)(const float* x, int64_t count, float best, float temperature, float* y, float* w,
                       float* block_best, double* block_mass);
  // A row of an int8 cache, from floats and to `attention_query`.
  void (*quantize_row)(const float* x, char* row, int64_t dim);
  void (*dequantize_row)(const char* row, void* out, int64_t dim);
  void (*rotate)(float* x, const float* cos, const float* sin, int64_t half, bool interleaved);
  // What queries over a bf16 cache, and the rows of an int8 cache, are rounded to: kBFloat16 where VDPBF16PS exists,
  // else kFloat32.
  int32_t attention_query;
  void (*attention_part)(const AttentionPart*);
  // Adds a part to a running result: both are (max, sum, out[dim]).
  void (*attention_merge)(float* max, float* sum, float* out, const float* part_max, const float* part_sum,
                          const float* part_out, int64_t dim);
  void (*attention_finish)(const float* sum, const float* in, float* out, int64_t dim);
  Peak peak[kNumKinds];  // of matmul[kind]
  void (*read_memory)(const char* data, int64_t bytes);
};

// One function per ISA object file, which fills its table; the only symbols those files export.
extern "C" {
void moe_kernels_avx2(KernelTable* table);
void moe_kernels_avx512(KernelTable* table);
void moe_kernels_avx512bf16(KernelTable* table);
void moe_kernels_amx(KernelTable* table);
}
