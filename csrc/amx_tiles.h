// AMX instructions, one wrapper each. Included inside an anonymous namespace.
//
// Written here because gcc 12's amxtileintrin.h is wrong twice: its loads have no "memory" clobber, so a buffer filled
// just before may be read too early or never be written, and its configuration load declares 8 of its 64 bytes.

// The operand of LDTILECFG, palette 1: eight tiles of up to 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

static inline void tile_configure(const TileConfig& config) {
  __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

// Back to the state of a thread that never used AMX: nothing to save when it is switched out.
static inline void tile_release() { __asm__ volatile("tilerelease" ::: "memory"); }

template <int TILE>
static inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(TILE) : "memory");
}

// Row r of the tile is at `from` + OFFSET + r * stride.
template <int TILE, int OFFSET = 0>
static inline void tile_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd %c3(%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE), "i"(OFFSET) : "memory");
}

template <int TILE>
static inline void tile_store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}

// C[m][n] += sum over 16 pairs of A[m][pair] * B[pair][n]: bf16 products, even and odd k in a float32 chain each, their
// sum added to C. Subnormals count as zero, rounding is to nearest even, MXCSR is ignored.
template <int C, int A, int B>
static inline void tile_dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B) : "memory");
}
