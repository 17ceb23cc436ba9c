/* AMX without the hardware: preloaded into a process, it executes the tile instructions that csrc/amx_tiles.h emits
 * when they raise SIGILL, as the SDM describes them. For tests only; slow (microseconds per trap).
 *
 *   cc -O2 -shared -fPIC -o amx_emulator.so amx_emulator.c;  LD_PRELOAD=./amx_emulator.so MOE_FORCE_ISA=amx ...
 *
 * Whoever replaces the SIGILL handler switches it off: run pytest with -p no:faulthandler.
 * The handler allocates nothing and locks nothing; tiles are thread-local in the static TLS block of a preloaded object.
 */
#define _GNU_SOURCE
#include <immintrin.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

/* csrc/cpu_features.cpp looks for this symbol. */
const int moe_amx_emulator = 1;

enum { kTiles = 8, kRows = 16, kRowBytes = 64 };

typedef struct {
  int configured;
  uint8_t rows[kTiles];
  uint16_t row_bytes[kTiles];
  uint8_t data[kTiles][kRows][kRowBytes];
} TileState;

static __thread TileState state __attribute__((tls_model("initial-exec")));

static void fatal(const char* what) {
  static const char prefix[] = "amx_emulator: ";
  if (write(2, prefix, sizeof prefix - 1) < 0 || write(2, what, strlen(what)) < 0 || write(2, "\n", 1) < 0) _exit(134);
  _exit(133);
}

/* A decoded instruction: VEX.128.W0 in map 0F38, the only form AMX has. */
typedef struct {
  unsigned prefix; /* pp: 0 none, 1 66, 2 F3, 3 F2 */
  unsigned opcode, mod, reg, rm, vvvv;
  const uint8_t* base; /* memory forms: the address without the index, */
  int64_t index;       /* and the scaled index, which is the stride of tile loads and stores */
  int has_sib;
  unsigned length;
} Instruction;

static int64_t register_value(const ucontext_t* context, unsigned number) {
  static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[order[number]];
}

static int32_t displacement(const uint8_t* at, unsigned mod, int absolute, unsigned* size) {
  int32_t wide;
  *size = absolute || mod == 2 ? 4 : mod == 1 ? 1 : 0;
  if (*size == 1) return (int8_t)*at;
  if (*size == 0) return 0;
  memcpy(&wide, at, 4);
  return wide;
}

/* 0 if this is no VEX instruction of the shape above. */
static int decode(const uint8_t* code, const ucontext_t* context, Instruction* in) {
  if (code[0] != 0xc4) return 0;
  const unsigned r = !(code[1] & 0x80), x = !(code[1] & 0x40), b = !(code[1] & 0x20), map = code[1] & 0x1f;
  if (map != 2 || (code[2] & 0x84)) return 0; /* 0F38, W0, L0 */
  memset(in, 0, sizeof *in);
  in->prefix = code[2] & 3;
  in->vvvv = ~code[2] >> 3 & 15;
  in->opcode = code[3];
  in->mod = code[4] >> 6;
  in->reg = (code[4] >> 3 & 7) | r << 3;
  in->rm = (code[4] & 7) | b << 3;
  in->length = 5;
  if (in->mod == 3) return 1;
  unsigned size;
  if ((code[4] & 7) == 4) {
    const unsigned sib = code[5], index = (sib >> 3 & 7) | x << 3, base = (sib & 7) | b << 3;
    const int no_base = (sib & 7) == 5 && in->mod == 0;
    const int64_t from = displacement(code + 6, in->mod, no_base, &size);
    in->length = 6 + size;
    in->has_sib = 1;
    in->index = index == 4 ? 0 : (int64_t)((uint64_t)register_value(context, index) << (sib >> 6));
    in->base = (const uint8_t*)(from + (no_base ? 0 : register_value(context, base)));
    return 1;
  }
  const int rip_relative = (code[4] & 7) == 5 && in->mod == 0;
  const int64_t from = displacement(code + 5, in->mod, rip_relative, &size);
  in->length = 5 + size;
  in->base = (const uint8_t*)(from + (rip_relative ? (int64_t)code + in->length : register_value(context, in->rm)));
  return 1;
}

static void load_config(const uint8_t* config) {
  const uint8_t* const reserved[] = {config + 2, config + 32, config + 56};
  static const int reserved_bytes[] = {14, 16, 8};
  memset(&state, 0, sizeof state);
  if (config[0] == 0) return; /* palette 0: the initial state */
  if (config[0] != 1) fatal("LDTILECFG: unknown palette");
  if (config[1] != 0) fatal("LDTILECFG: start_row is not 0");
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < reserved_bytes[i]; ++j) {
      if (reserved[i][j]) fatal("LDTILECFG: a reserved byte is not 0");
    }
  }
  for (int t = 0; t < kTiles; ++t) {
    memcpy(&state.row_bytes[t], config + 16 + 2 * t, 2);
    state.rows[t] = config[48 + t];
    if (state.rows[t] > kRows || state.row_bytes[t] > kRowBytes) fatal("LDTILECFG: a tile is too large");
    if (!state.rows[t] != !state.row_bytes[t]) fatal("LDTILECFG: a tile has rows or columns of 0");
  }
  state.configured = 1;
}

static unsigned tile(unsigned number) {
  if (!state.configured) fatal("a tile is used before LDTILECFG");
  if (number >= kTiles || !state.rows[number]) fatal("a tile is used that the configuration does not have");
  return number;
}

static void load_tile(unsigned t, const Instruction* in) {
  memset(state.data[t], 0, sizeof state.data[t]);
  for (int r = 0; r < state.rows[t]; ++r) memcpy(state.data[t][r], in->base + r * in->index, state.row_bytes[t]);
}

static void store_tile(unsigned t, const Instruction* in) {
  for (int r = 0; r < state.rows[t]; ++r) {
    memcpy((uint8_t*)in->base + r * in->index, state.data[t][r], state.row_bytes[t]);
  }
}

/* Even and odd halves of bf16 pairs as floats. */
__attribute__((target("avx2,fma"))) static inline __m256 even(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
}
__attribute__((target("avx2,fma"))) static inline __m256 odd(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000u)));
}

/* Tiles are zero beyond their size, so whole rows are computed; the result is cut to the destination's columns. */
__attribute__((target("avx2,fma"))) static void dot_bf16(unsigned c, unsigned a, unsigned b) {
  if (c == a || c == b || a == b) fatal("TDPBF16PS: operands are not three tiles");
  if (state.row_bytes[c] % 4 || state.row_bytes[a] % 4 || state.row_bytes[b] % 4 || state.rows[c] != state.rows[a] ||
      state.row_bytes[c] != state.row_bytes[b] || state.row_bytes[a] / 4 != state.rows[b]) {
    fatal("TDPBF16PS: the shapes of the tiles do not fit");
  }
  const unsigned saved = _mm_getcsr();
  _mm_setcsr(0x9fc0); /* nearest even, no exceptions, subnormals are zero on the way in and out */
  for (int m = 0; m < state.rows[c]; ++m) {
    __m256 chain[2][2] = {{_mm256_setzero_ps(), _mm256_setzero_ps()}, {_mm256_setzero_ps(), _mm256_setzero_ps()}};
    for (int k = 0; k < state.row_bytes[a] / 4; ++k) {
      int32_t pair;
      memcpy(&pair, state.data[a][m] + 4 * k, 4);
      const __m256i row = _mm256_set1_epi32(pair);
      for (int half = 0; half < 2; ++half) {
        const __m256i column = _mm256_loadu_si256((const __m256i*)state.data[b][k] + half);
        chain[half][0] = _mm256_fmadd_ps(even(row), even(column), chain[half][0]);
        chain[half][1] = _mm256_fmadd_ps(odd(row), odd(column), chain[half][1]);
      }
    }
    uint8_t out[kRowBytes];
    for (int half = 0; half < 2; ++half) {
      const __m256 old = _mm256_loadu_ps((const float*)state.data[c][m] + 8 * half);
      const __m256 sum = _mm256_add_ps(old, _mm256_add_ps(chain[half][0], chain[half][1]));
      _mm256_storeu_ps((float*)out + 8 * half, sum);
    }
    memset(state.data[c][m], 0, kRowBytes);
    memcpy(state.data[c][m], out, state.row_bytes[c]);
  }
  memset(state.data[c][state.rows[c]], 0, (size_t)(kRows - state.rows[c]) * kRowBytes);
  _mm_setcsr(saved);
}

static int execute(const Instruction* in) {
  const int memory = in->mod != 3;
  switch (in->opcode << 4 | in->prefix) {
    case 0x490: /* LDTILECFG m512, or TILERELEASE */
      if (memory && in->reg == 0) load_config(in->base);
      else if (!memory && in->reg == 0 && in->rm == 0) memset(&state, 0, sizeof state);
      else return 0;
      return 1;
    case 0x493: /* TILEZERO */
      if (memory || in->rm != 0) return 0;
      memset(state.data[tile(in->reg)], 0, sizeof state.data[0]);
      return 1;
    case 0x4b3: /* TILELOADD */
      if (!memory || !in->has_sib) return 0;
      load_tile(tile(in->reg), in);
      return 1;
    case 0x4b2: /* TILESTORED */
      if (!memory || !in->has_sib) return 0;
      store_tile(tile(in->reg), in);
      return 1;
    case 0x5c2: /* TDPBF16PS: reg += rm * vvvv */
      if (memory) return 0;
      dot_bf16(tile(in->reg), tile(in->rm), tile(in->vvvv));
      return 1;
  }
  return 0;
}

static void on_sigill(int signal_number, siginfo_t* info, void* opaque) {
  (void)signal_number;
  (void)info;
  ucontext_t* context = opaque;
  Instruction in;
  int executed = 0; /* a trap costs far more than an instruction: take those that follow along */
  while (decode((const uint8_t*)context->uc_mcontext.gregs[REG_RIP], context, &in) && execute(&in)) {
    context->uc_mcontext.gregs[REG_RIP] += in.length;
    ++executed;
  }
  if (!executed) fatal("an illegal instruction that is not one of those emulated");
}

__attribute__((constructor)) static void install(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = on_sigill;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  sigaction(SIGILL, &action, 0);
}
