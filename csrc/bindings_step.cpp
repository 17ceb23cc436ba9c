// Python's side of step.h: its descriptors and the program. moe_runtime/kernels/step.py has checked every tensor.
#include <pybind11/stl.h>

#include "bindings.h"
#include "step.h"

namespace {

// A descriptor of step.h as a Python class: fields are given by name, addresses as integers; what is not given is zero.
template <class S>
struct Descriptor : py::class_<S> {
  Descriptor(py::module_& m, const char* name) : py::class_<S>(m, name) {
    this->def(py::init([](const py::kwargs& fields) {
      S made{};
      py::object view = py::cast(&made, py::return_value_policy::reference);
      for (const auto& [field, value] : fields) py::setattr(view, field, value);
      return made;
    }));
  }
  template <class T>
  Descriptor& field(const char* name, T S::*member) {
    if constexpr (std::is_pointer_v<T>) {
      this->def_property(name, nullptr, [member](S& s, Address a) { s.*member = reinterpret_cast<T>(a); });
    } else {
      this->def_readwrite(name, member);
    }
    return *this;
  }
};

}  // namespace

void bind_step(py::module_& m) {
  Descriptor<Table>(m, "Table").field("data", &Table::data).field("rows", &Table::rows)
      .field("columns", &Table::columns).field("dtype", &Table::dtype);
  Descriptor<Matrix>(m, "Matrix").field("data", &Matrix::data).field("heads", &Matrix::heads).field("n", &Matrix::n)
      .field("k", &Matrix::k).field("format", &Matrix::format).field("bias", &Matrix::bias);
  Descriptor<Norm>(m, "Norm").field("weight", &Norm::weight).field("size", &Norm::size).field("eps", &Norm::eps);
  Descriptor<Rotation>(m, "Rotation").field("cos", &Rotation::cos).field("sin", &Rotation::sin)
      .field("positions", &Rotation::positions).field("half", &Rotation::half)
      .field("interleaved", &Rotation::interleaved);
  Descriptor<CacheShape>(m, "CacheShape").field("num_blocks", &CacheShape::num_blocks)
      .field("kv_heads", &CacheShape::kv_heads).field("block_size", &CacheShape::block_size)
      .field("key_dim", &CacheShape::key_dim).field("value_dim", &CacheShape::value_dim)
      .field("dtype", &CacheShape::dtype);
  Descriptor<LayerCache>(m, "LayerCache").field("keys", &LayerCache::keys).field("values", &LayerCache::values)
      .field("shape", &LayerCache::shape);
  typedef GroupedAttention Grouped;
  Descriptor<Grouped>(m, "GroupedAttention").field("inputs", &Grouped::inputs).field("output", &Grouped::output)
      .field("query_norm", &Grouped::query_norm).field("key_norm", &Grouped::key_norm)
      .field("norm_by_head", &Grouped::norm_by_head).field("clip", &Grouped::clip).field("scale", &Grouped::scale);
  typedef LatentAttention Latent;
  Descriptor<Latent>(m, "LatentAttention").field("inputs", &Latent::inputs).field("query_norm", &Latent::query_norm)
      .field("query_expand", &Latent::query_expand).field("latent_norm", &Latent::latent_norm)
      .field("absorb", &Latent::absorb).field("expand", &Latent::expand).field("output", &Latent::output)
      .field("scale", &Latent::scale);
  typedef RouterRules Rules;
  Descriptor<Rules>(m, "RouterRules").field("top_k", &Rules::top_k).field("num_groups", &Rules::num_groups)
      .field("topk_groups", &Rules::topk_groups).field("sigmoid", &Rules::sigmoid)
      .field("normalise", &Rules::normalise).field("top2_sum", &Rules::top2_sum)
      .field("softmax_after_topk", &Rules::softmax_after_topk).field("routed_scaling", &Rules::routed_scaling)
      .field("norm_epsilon", &Rules::norm_epsilon);
  Descriptor<Residence>(m, "Residence").field("slot_of", &Residence::slot_of)
      .field("num_experts", &Residence::num_experts).field("num_slots", &Residence::num_slots)
      .field("layer", &Residence::layer);
  Descriptor<Constants>(m, "Constants").field("rows", &Constants::rows).field("count", &Constants::count);
  Descriptor<Recovery>(m, "Recovery").field("offsets", &Recovery::offsets)
      .field("stand_ins", &Recovery::stand_ins).field("constants", &Recovery::constants);
  Descriptor<Mixture>(m, "Mixture").field("router", &Mixture::router)
      .field("selection_bias", &Mixture::selection_bias).field("rules", &Mixture::rules)
      .field("masks", &Mixture::masks).field("num_masks", &Mixture::num_masks)
      .field("gate_up", &Mixture::gate_up).field("down", &Mixture::down).field("num_experts", &Mixture::num_experts)
      .field("hidden", &Mixture::hidden).field("intermediate", &Mixture::intermediate)
      .field("format", &Mixture::format).field("residence", &Mixture::residence)
      .field("recovery", &Mixture::recovery);
  Descriptor<Layer>(m, "Layer").field("attention_norm", &Layer::attention_norm).field("attention", &Layer::attention)
      .field("cache", &Layer::cache).field("mlp_norm", &Layer::mlp_norm).field("experts", &Layer::experts)
      .field("shared", &Layer::shared);
  Descriptor<Model>(m, "Model").field("embedding", &Model::embedding).field("layers", &Model::layers)
      .field("norm", &Model::norm).field("head", &Model::head).field("rotation", &Model::rotation);
  py::class_<StepProgram>(m, "StepProgram").def(py::init<Model>())
      .def("run", [](StepProgram& program, Address token_ids, Address positions, Address slots, Address sequence_rows,
                     Address tables, Address logit_rows, Address mask_rows, int64_t tokens, int64_t sequences,
                     int64_t max_blocks, int64_t rows, Address lost, Address outside, Address logits) {
    const auto longs = [](Address a) { return reinterpret_cast<const int64_t*>(a); };
    program.run({longs(token_ids), ints(positions), longs(slots), ints(sequence_rows), ints(tables),
                 longs(logit_rows), ints(mask_rows), tokens, sequences, max_blocks, rows,
                 {floats_out(lost), reinterpret_cast<int64_t*>(outside)}}, floats_out(logits));
  }, py::call_guard<NoGil>());
}
