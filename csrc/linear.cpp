// Dense linear layers, one weight or one per head, cut into (head, row chunk, panel chunk) tasks.
#include "activations.h"
#include "cpu_features.h"
#include "ops.h"

namespace {
constexpr int64_t kRowsPerTask = 96;
constexpr int64_t kParallelFrom = 1 << 17;  // multiply-adds below which waking a second thread costs more than it gives
}  // namespace

void linear(const float* x, int64_t num_tokens, int64_t heads, int64_t k, const char* packed, int64_t n, int32_t format,
            const float* bias, float* out) {
  const KernelTable& table = kernels();
  Scratch scratch;
  Activations rows(table, x, num_tokens * heads, k, format, scratch);
  const int64_t panels = round_up(n, kPanelColumns) / kPanelColumns;
  const int64_t row_chunks = (num_tokens + kRowsPerTask - 1) / kRowsPerTask;
  // About eight tasks per thread, so that a thread the system interrupts does not hold up the rest.
  const int64_t wanted = panels * heads * row_chunks / (num_threads() * 8);
  const int64_t chunk = std::clamp<int64_t>(wanted / 2 * 2, 2, 16);
  const int64_t panel_chunks = (panels + chunk - 1) / chunk;

  SlicedStage stage(heads * row_chunks, panel_chunks);
  run(num_tokens * heads * n * k >= kParallelFrom, [&](int) {
    rows.prepare();
    stage.drain([&](int64_t repeat, int64_t part) {
      const int64_t first_panel = part * chunk;
      const int64_t first_row = repeat % row_chunks * kRowsPerTask;
      const int64_t head = repeat / row_chunks;
      const int64_t first_column = first_panel * kPanelColumns;
      MatmulArgs args = {};
      args.rows = rows.row(first_row * heads + head);
      args.row_stride = rows.stride() * heads;
      args.row_type = rows.type();
      args.row_index = nullptr;
      args.num_rows = std::min(kRowsPerTask, num_tokens - first_row);
      args.panel_stride = panel_bytes(k, format);
      args.panels = packed + head * packed_bytes(n, k, format) + first_panel * args.panel_stride;
      args.num_panels = std::min(chunk, panels - first_panel);
      args.format = format;
      args.k = k;
      args.out = out + (first_row * heads + head) * n + first_column;
      args.out_stride = heads * n * (int64_t)sizeof(float);
      args.num_columns = std::min(args.num_panels * kPanelColumns, n - first_column);
      args.bias = bias ? bias + first_column : nullptr;
      table.matmul[format_kind(format)](&args);
    });
    stage.wait();
  });
}
