// Operations on independent rows: norms, SwiGLU, rotary positions, cache writes.
#include <string>

#include "cache_layout.h"
#include "cpu_features.h"
#include "errors.h"
#include "ops.h"
#include "row_tasks.h"

void rms_norm(const float* x, const float* residual, const float* weight, double eps, int64_t rows, int64_t dim,
              float* out, float* total) {
  const KernelTable& table = kernels();
  for_row_chunks(rows, dim, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * dim; at < end * dim; at += dim) {
      table.rms_norm(x + at, residual ? residual + at : nullptr, weight, (float)eps, dim, out + at,
                     total ? total + at : nullptr);
    }
  });
}

void silu_mul(const float* gate, const float* up, int64_t count, float* out) {
  const KernelTable& table = kernels();
  constexpr int64_t kRow = 4096;  // a multiple of every lane count, so chunks cannot change a bit
  for_row_chunks((count + kRow - 1) / kRow, kRow, [&](int64_t begin, int64_t end) {
    table.silu_mul(gate + begin * kRow, up + begin * kRow, out + begin * kRow, std::min(end * kRow, count) - begin * kRow);
  });
}

void rope(float* x, int64_t num_tokens, int64_t heads, int64_t dim, const float* cos, const float* sin,
          int64_t num_positions, int64_t half, const int32_t* positions, bool interleaved, int64_t offset) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (positions[t] < 0 || positions[t] >= num_positions) {
      throw KernelFault("rope: positions[" + std::to_string(t) + "] = " + std::to_string(positions[t]) +
                        ", expected 0 <= position < " + std::to_string(num_positions));
    }
  }
  const KernelTable& table = kernels();
  for_row_chunks(num_tokens, heads * dim, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float *c = cos + positions[t] * half, *s = sin + positions[t] * half;
      for (int64_t h = 0; h < heads; ++h) table.rotate(x + (t * heads + h) * dim + offset, c, s, half, interleaved);
    }
  });
}

void write_cache(char* cache, int64_t num_blocks, int64_t heads, int64_t block_size, int64_t dim, int32_t dtype,
                 const float* values, const int64_t* slots, int64_t num_tokens) {
  const KernelTable& table = kernels();
  const int64_t row_bytes = cache_row_bytes(dim, dtype);
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (slots[t] < 0 || slots[t] >= num_blocks * block_size) {
      throw KernelFault("write_cache: slots[" + std::to_string(t) + "] = " + std::to_string(slots[t]) +
                        ", expected 0 <= slot < " + std::to_string(num_blocks * block_size));
    }
  }
  // Heads are tasks, tokens are not: two may name the same slot (padding), and the last must win.
  Stage stage(heads);
  run(heads > 1 && num_tokens * heads * dim >= kParallelRows, [&](int) {
    stage.drain([&](int64_t h) {
      for (int64_t t = 0; t < num_tokens; ++t) {
        const float* from = values + (t * heads + h) * dim;
        char* row = cache + ((slots[t] / block_size * heads + h) * block_size + slots[t] % block_size) * row_bytes;
        if (dtype == kInt8) table.quantize_row(from, row, dim);
        else table.convert(from, row, dim, dtype);
      }
    });
    stage.wait();
  });
}
