// The operations behind moe_runtime.kernels.cpu. Shapes and meanings are those of moe_runtime/kernels/reference.py;
// the caller has checked shapes, dtypes and contiguity. Values (ids, slots, positions) are checked here: KernelFault.
#pragma once
#include <cstdint>

#include "layout.h"

struct RouterRules {
  int64_t top_k, num_groups, topk_groups;
  bool sigmoid, normalise, top2_sum, softmax_after_topk;
  double routed_scaling, norm_epsilon;
};

// pack.cpp
enum class PackTarget : int { kLinear = 0, kGate = 1, kUp = 2 };
void pack(const char* weight, int64_t n, int64_t k, int32_t dtype, PackTarget target, char* packed);
void unpack(const char* packed, int64_t n, int64_t k, int32_t dtype, PackTarget target, char* weight);
// pack_integer.cpp: codes [N, K], scales [N, groups] and zeros [N, groups] or null, as QuantizedWeight in packed.py.
void pack_integer(const uint8_t* codes, const float* scales, const uint8_t* zeros, int64_t n, int64_t k, int32_t format,
                  PackTarget target, char* packed);
void unpack_integer(const char* packed, int64_t n, int64_t k, int32_t format, PackTarget target, uint8_t* codes,
                    float* scales, uint8_t* zeros);
void advise_huge_pages(char* data, int64_t bytes);

// checksum.cpp: of memory and of a range of an open file.
uint64_t checksum(const char* data, int64_t bytes);
uint64_t checksum_file(int descriptor, int64_t offset, int64_t bytes);

// router.cpp
struct ExpertMasks {       // the experts that each token may use; rows null: all of them
  const uint8_t* allowed;  // [count, num_experts], 0: forbidden
  int64_t count;
  const int32_t* rows;     // [tokens], -1: no mask
  // What the rows do about forbidden experts, both null or neither: moe_runtime/kernels/route_recovery.py.
  const float* offsets = nullptr;      // [count, num_experts], added to logits
  const int32_t* stand_ins = nullptr;  // [count, num_experts]: a forbidden expert's constant, -1: none
};
struct RouteMeter {        // what the masks do, added to what is there; null: not asked
  float* lost;             // [tokens]: the part of the weight that goes to forbidden experts without the mask
  int64_t* outside;        // choices that a mask forbids: none, unless it allows fewer than top_k
};
// ids [tokens, top_k]: experts, or num_experts + the constant that stands in for one.
void route(const float* logits, int64_t num_tokens, int64_t num_experts, const float* bias, const RouterRules& rules,
           const ExpertMasks& masks, const RouteMeter& meter, int32_t* ids, float* weights);

// linear.cpp: x [T, heads, K], one packed [N, K] per head, out [T, heads, N]; bias [N] or null.
void linear(const float* x, int64_t num_tokens, int64_t heads, int64_t k, const char* packed, int64_t n, int32_t format,
            const float* bias, float* out);

// moe.cpp
struct Residence {         // which experts of a layer are in memory; slot_of null: all
  const int32_t* slot_of;  // [num_experts]: place among the num_slots that are; negative: not there
  int64_t num_experts, num_slots, layer;
};
// ids [tokens, top_k] of a layer's experts -> their places; `slots` may be `ids`. The ids of constants, num_constants
// after the experts', become as many after the places. KernelFault names layer and expert of one that is not there.
void expert_slots(const int32_t* ids, int64_t num_tokens, int64_t top_k, const Residence& residence,
                  int64_t num_constants, int32_t* slots);

struct MoeShape {
  int64_t num_tokens, top_k, hidden, intermediate, num_experts;
};
struct Constants {         // what stands in for experts: the same for every token; ids num_experts and up
  const float* rows;       // [count, hidden]
  int64_t count;
};
// What the experts made of the tokens, before the weights, for profiling. Sums are in an order that neither threads nor
// sizes of tasks change.
struct Moments {
  const uint8_t* counted;  // [num_tokens]: whether the token goes into `sums`
  double* sums;            // [num_experts, hidden]: every expert's outputs are added
  double* squares;         // [num_tokens, top_k]: each output's sum of squares
  float* peaks;            // [num_tokens, top_k]: and its largest absolute number; a NaN shows in `squares` alone
};
void fused_moe(const float* x, const int32_t* ids, const float* weights, const char* gate_up, const char* down,
               const MoeShape& shape, int32_t format, float* out, const Constants& constants = {},
               const Moments* moments = nullptr);

// sampling.cpp: the id drawn from softmax(logits / temperature) after the filters; -1 if no logit is finite and largest.
struct SamplingRules {
  double temperature, min_p, top_p, fraction;  // fraction in [0, 1) of the probability mass
  int64_t top_k;
};
int64_t choose_token(const float* logits, int64_t size, const SamplingRules& rules);

// rows.cpp. `out` of rms_norm may be `x` where there is no residual, and `total` may be `residual`.
void rms_norm(const float* x, const float* residual, const float* weight, double eps, int64_t rows, int64_t dim,
              float* out, float* total);
void silu_mul(const float* gate, const float* up, int64_t count, float* out);
void rope(float* x, int64_t num_tokens, int64_t heads, int64_t dim, const float* cos, const float* sin,
          int64_t num_positions, int64_t half, const int32_t* positions, bool interleaved, int64_t offset);
void write_cache(char* cache, int64_t num_blocks, int64_t heads, int64_t block_size, int64_t dim, int32_t dtype,
                 const float* values, const int64_t* slots, int64_t num_tokens);

// attention.cpp
struct CacheShape {
  int64_t num_blocks, kv_heads, block_size, key_dim, value_dim;
  int32_t dtype;
};
void attention(const float* q, int64_t num_tokens, int64_t num_heads, const char* keys, const char* values,
               const CacheShape& cache, const int32_t* positions, const int32_t* sequence_rows,
               const int32_t* block_tables, int64_t num_sequences, int64_t max_blocks, double scale, float* out);
