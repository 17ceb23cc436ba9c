// A table of functions over raw addresses. moe_runtime/kernels/cpu.py has checked every tensor before its address comes
// here; the GIL is released while a kernel runs.
#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu_features.h"
#include "cpu_quota.h"
#include "errors.h"
#include "machine_limits.h"
#include "ops.h"
#include "thread_pool.h"

namespace {

void raise_as(const char* name, const std::exception& error) {
  PyErr_SetString(py::module_::import("moe_runtime.errors").attr(name).ptr(), error.what());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "moe_runtime CPU kernels; use them through moe_runtime.kernels";
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const IsaMissing& e) {
      raise_as("IsaUnavailable", e);
    } catch (const KernelFault& e) {
      raise_as("KernelError", e);
    }
  });
  const py::call_guard<NoGil> no_gil;

  m.attr("LAYOUT_VERSION") = MOE_LAYOUT_VERSION;
  m.def("supported_isas", &supported_isas);
  m.def("select_isa", &select_isa);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("set_num_threads", &set_num_threads);
  m.def("num_threads", &num_threads);
  m.def("read_nodes", &read_nodes);  // folder like /sys/devices/system/node
  m.def("nodes", &nodes);
  m.def("set_nodes", &set_nodes);
  m.def("cgroup_cpus", &cgroup_cpus);  // file like /proc/self/cgroup, folder like /sys/fs/cgroup

  // For bench/: what the machine can do at best.
  m.def("read_bandwidth", [](Address data, int64_t size, int64_t passes) {
    return read_bandwidth(bytes(data), size, passes);
  }, no_gil);
  m.def("matrix_peak", &matrix_peak, no_gil);
  m.def("matrix_peak_name", &matrix_peak_name);

  m.def("packed_bytes", &packed_bytes);                  // n, k, format
  m.def("packed_gate_up_bytes", &packed_gate_up_bytes);  // intermediate, hidden, format
  m.def("advise_huge_pages", [](Address data, int64_t size) { advise_huge_pages(bytes_out(data), size); });
  m.def("pack", [](Address weight, int64_t n, int64_t k, int32_t dtype, int target, Address packed) {
    pack(bytes(weight), n, k, dtype, (PackTarget)target, bytes_out(packed));
  }, no_gil);
  m.def("unpack", [](Address packed, int64_t n, int64_t k, int32_t dtype, int target, Address weight) {
    unpack(bytes(packed), n, k, dtype, (PackTarget)target, bytes_out(weight));
  }, no_gil);

  m.def("pack_integer", [](Address codes, Address scales, Address zeros, int64_t n, int64_t k, int32_t format, int target,
                           Address packed) {
    pack_integer((const uint8_t*)codes, floats(scales), (const uint8_t*)zeros, n, k, format, (PackTarget)target,
                 bytes_out(packed));
  }, no_gil);
  m.def("unpack_integer", [](Address packed, int64_t n, int64_t k, int32_t format, int target, Address codes,
                             Address scales, Address zeros) {
    unpack_integer(bytes(packed), n, k, format, (PackTarget)target, (uint8_t*)codes, floats_out(scales),
                   (uint8_t*)zeros);
  }, no_gil);

  m.def("checksum", [](Address data, int64_t size) { return checksum(bytes(data), size); }, no_gil);
  m.def("checksum_file", &checksum_file, no_gil);  // descriptor, offset, bytes

  m.def("route", [](Address logits, int64_t tokens, int64_t experts, Address bias, int64_t top_k, int64_t num_groups,
                    int64_t topk_groups, bool sigmoid, bool normalise, bool top2_sum, bool softmax_after_topk,
                    double routed_scaling, double norm_epsilon, Address masks, int64_t num_masks, Address mask_rows,
                    Address offsets, Address stand_ins, Address lost, Address outside, Address ids, Address weights) {
    const RouterRules rules{top_k, num_groups, topk_groups, sigmoid, normalise, top2_sum, softmax_after_topk,
                            routed_scaling, norm_epsilon};
    route(floats(logits), tokens, experts, floats(bias), rules,
          {(const uint8_t*)masks, num_masks, ints(mask_rows), floats(offsets), ints(stand_ins)},
          {floats_out(lost), reinterpret_cast<int64_t*>(outside)}, reinterpret_cast<int32_t*>(ids),
          floats_out(weights));
  }, no_gil);
  m.def("linear", [](Address x, int64_t tokens, int64_t heads, int64_t k, Address packed, int64_t n, int32_t format,
                     Address bias, Address out) {
    linear(floats(x), tokens, heads, k, bytes(packed), n, format, floats(bias), floats_out(out));
  }, no_gil);
  m.def("expert_slots", [](Address ids, int64_t tokens, int64_t top_k, Address slot_of, int64_t experts, int64_t count,
                           int64_t layer, int64_t num_constants, Address slots) {
    expert_slots(ints(ids), tokens, top_k, {ints(slot_of), experts, count, layer}, num_constants,
                 reinterpret_cast<int32_t*>(slots));
  }, no_gil);
  m.def("fused_moe", [](Address x, Address ids, Address weights, Address gate_up, Address down, int64_t tokens,
                        int64_t top_k, int64_t hidden, int64_t intermediate, int64_t experts, int32_t format,
                        Address constants, int64_t num_constants, Address out) {
    fused_moe(floats(x), ints(ids), floats(weights), bytes(gate_up), bytes(down),
              {tokens, top_k, hidden, intermediate, experts}, format, floats_out(out),
              {floats(constants), num_constants});
  }, no_gil);
  m.def("expert_moments", [](Address x, Address ids, Address weights, Address gate_up, Address down, int64_t tokens,
                             int64_t top_k, int64_t hidden, int64_t intermediate, int64_t experts, int32_t format,
                             Address counted, Address sums, Address out, Address squares, Address peaks) {
    const Moments moments{reinterpret_cast<const uint8_t*>(counted), reinterpret_cast<double*>(sums),
                          reinterpret_cast<double*>(squares), floats_out(peaks)};
    fused_moe(floats(x), ints(ids), floats(weights), bytes(gate_up), bytes(down),
              {tokens, top_k, hidden, intermediate, experts}, format, floats_out(out), {}, &moments);
  }, no_gil);
  m.def("choose_token", [](Address logits, int64_t size, double temperature, double min_p, int64_t top_k, double top_p,
                           double fraction) {
    return choose_token(floats(logits), size, {temperature, min_p, top_p, fraction, top_k});
  }, no_gil);
  m.def("rms_norm", [](Address x, Address residual, Address weight, double eps, int64_t rows, int64_t dim, Address out,
                       Address total) {
    rms_norm(floats(x), floats(residual), floats(weight), eps, rows, dim, floats_out(out), floats_out(total));
  }, no_gil);
  m.def("silu_mul", [](Address gate, Address up, int64_t count, Address out) {
    silu_mul(floats(gate), floats(up), count, floats_out(out));
  }, no_gil);
  m.def("rope", [](Address x, int64_t tokens, int64_t heads, int64_t dim, Address cos, Address sin, int64_t positions,
                   int64_t half, Address position_of, bool interleaved, int64_t offset) {
    rope(floats_out(x), tokens, heads, dim, floats(cos), floats(sin), positions, half, ints(position_of), interleaved,
         offset);
  }, no_gil);
  m.def("write_cache", [](Address cache, int64_t blocks, int64_t heads, int64_t block_size, int64_t dim, int32_t dtype,
                          Address values, Address slots, int64_t tokens) {
    write_cache(bytes_out(cache), blocks, heads, block_size, dim, dtype, floats(values),
                reinterpret_cast<const int64_t*>(slots), tokens);
  }, no_gil);
  m.def("attention", [](Address q, int64_t tokens, int64_t heads, Address keys, Address values, int64_t blocks,
                        int64_t kv_heads, int64_t block_size, int64_t key_dim, int64_t value_dim, int32_t dtype,
                         Address positions, Address sequence_rows, Address tables, int64_t sequences,
                        int64_t max_blocks, double scale, Address out) {
    attention(floats(q), tokens, heads, bytes(keys), bytes(values),
              {blocks, kv_heads, block_size, key_dim, value_dim, dtype}, ints(positions),
              ints(sequence_rows), ints(tables), sequences, max_blocks, scale, floats_out(out));
  }, no_gil);
  bind_step(m);
}
