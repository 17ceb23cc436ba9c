#include "cpu_features.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <mutex>

#include "errors.h"

// Tests only: defined by tests/kernels/amx_emulator.c where it is preloaded, and by nobody else. It then executes the
// AMX instructions that this machine lacks.
extern "C" __attribute__((weak)) const int moe_amx_emulator;

namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  void (*fill)(KernelTable*);
};

uint32_t extended_control_register() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// AMX's registers are large enough that Linux gives them only to processes that ask: here, once, for all threads. It may
// refuse (an old kernel, a sandbox, a thread with a small signal stack); then the machine counts as one without AMX.
bool tile_permission() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct Features {
  bool avx2 = false, avx512 = false, avx512bf16 = false, amx = false;

  Features() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool fma = c & (1u << 12), osxsave = c & (1u << 27), avx = c & (1u << 28), f16c = c & (1u << 29);
    if (!(fma && osxsave && avx && f16c)) return;
    // The processor having the registers is not enough: the kernel must save them (bits: SSE, AVX, then opmask,
    // upper halves of zmm0-15, zmm16-31).
    const uint32_t saved = extended_control_register();
    if ((saved & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = b & (1u << 5);
    const uint32_t f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31, vnni = 1u << 11, wanted = f | dq | bw | vl;
    avx512 = avx2 && (saved & 0xe6) == 0xe6 && (b & wanted) == wanted && (c & vnni);
    const unsigned leaves = a;
    const uint32_t tiles = 1u << 24 | 1u << 22;  // AMX-TILE, AMX-BF16; saved: XTILECFG, XTILEDATA
    amx = (d & tiles) == tiles && (saved & 0x60000) == 0x60000;
    if (avx512 && leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) avx512bf16 = a & (1u << 5);
    amx = avx512bf16 && ((amx && tile_permission()) || &moe_amx_emulator != nullptr);
  }
};

const Features& features() {
  static const Features found;
  return found;
}

// Best first. All read the same packed bytes (layout.h).
const Isa kIsas[] = {
    {"amx", [] { return features().amx; }, moe_kernels_amx},
    {"avx512bf16", [] { return features().avx512bf16; }, moe_kernels_avx512bf16},
    {"avx512", [] { return features().avx512; }, moe_kernels_avx512},
    {"avx2", [] { return features().avx2; }, moe_kernels_avx2},
};

std::atomic<const KernelTable*> selected{nullptr};

// Filled once, on machines that can run it; the table of every ISA has its place in memory for good.
const KernelTable* table_of(const Isa& isa) {
  static KernelTable tables[std::size(kIsas)];
  static std::once_flag filled[std::size(kIsas)];
  const size_t index = &isa - kIsas;
  std::call_once(filled[index], [&] { isa.fill(&tables[index]); });
  return &tables[index];
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text.empty() ? "none" : text;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (isa.supported()) names.push_back(isa.name);
  }
  return names;
}

void select_isa(const std::string& name) {
  std::string wanted = name;
  std::string origin = "isa";
  if (wanted.empty()) {
    const char* forced = std::getenv("MOE_FORCE_ISA");
    if (forced && *forced) {
      wanted = forced;
      origin = "MOE_FORCE_ISA";
    }
  }
  std::vector<std::string> known;
  for (const Isa& isa : kIsas) {
    known.push_back(isa.name);
    if ((wanted.empty() || wanted == isa.name) && isa.supported()) {
      selected.store(table_of(isa), std::memory_order_release);
      return;
    }
  }
  if (wanted.empty()) throw IsaMissing("the cpu backend needs AVX2, FMA and F16C; use --backend reference");
  const bool lacking = std::find(known.begin(), known.end(), wanted) != known.end();
  const std::string reason = lacking ? "this machine cannot run it" : "unknown, expected one of " + join(known);
  throw IsaMissing(origin + "=" + wanted + ": " + reason + "; this machine has: " + join(supported_isas()));
}

const KernelTable& kernels() {
  if (!selected.load(std::memory_order_acquire)) select_isa("");
  return *selected.load(std::memory_order_acquire);
}
