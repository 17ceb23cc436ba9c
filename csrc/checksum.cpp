// A checksum of weights at the speed of memory: CRC-32C in eight independent lanes, which hides the instruction's
// latency. Word i of 8 bytes belongs to lane i % 8, the bytes after the last 64 to a ninth; then the nine are mixed
// into 64 bits. A burst of errors within one lane is found for certain, as by any CRC; others but for one in 2^32.
// Only called on machines with AVX2, which all have SSE4.2.
#include <nmmintrin.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <string>

#include "errors.h"
#include "ops.h"

namespace {

constexpr int64_t kLanes = 8, kLine = 8 * kLanes;
constexpr int64_t kChunk = 256 << 10;  // fits in L2; a multiple of kLine

struct Sum {
  uint64_t lane[kLanes] = {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u};

  __attribute__((target("sse4.2"))) void lines(const char* data, int64_t count) {
    uint64_t own[kLanes];
    std::memcpy(own, lane, sizeof own);
    for (const char* end = data + count * kLine; data < end; data += kLine) {
      uint64_t words[kLanes];
      std::memcpy(words, data, sizeof words);
      for (int64_t i = 0; i < kLanes; ++i) own[i] = _mm_crc32_u64(own[i], words[i]);
    }
    std::memcpy(lane, own, sizeof own);
  }

  __attribute__((target("sse4.2"))) uint64_t finish(const char* tail, int64_t bytes) const {
    uint32_t last = ~0u;
    for (int64_t i = 0; i < bytes; ++i) last = _mm_crc32_u8(last, (uint8_t)tail[i]);
    // Not a CRC again, whose shifts would cancel those of the lanes. Each step can be undone, so none loses a change.
    uint64_t mixed = mix((uint64_t)bytes, last);
    for (uint64_t value : lane) mixed = mix(mixed, value);
    return mixed;
  }

  static uint64_t mix(uint64_t state, uint64_t value) {
    state = (state ^ value) * 0x9e3779b97f4a7c15u;
    return state ^ state >> 32;
  }
};

}  // namespace

uint64_t checksum(const char* data, int64_t bytes) {
  Sum sum;
  sum.lines(data, bytes / kLine);
  return sum.finish(data + bytes / kLine * kLine, bytes % kLine);
}

uint64_t checksum_file(int descriptor, int64_t offset, int64_t bytes) {
  // read, not mapped: pages nobody computes with stay out of this process, and an unreadable disk is an error, not SIGBUS.
  const std::unique_ptr<char[]> chunk(new char[kChunk]);
  Sum sum;
  for (;;) {
    const int64_t wanted = bytes < kChunk ? bytes : kChunk;
    int64_t got = 0;
    while (got < wanted) {
      const ssize_t count = pread(descriptor, chunk.get() + got, wanted - got, offset + got);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) throw KernelFault(std::string("checksum: ") + std::strerror(errno));
      if (count == 0) throw KernelFault("checksum: the file ends at byte " + std::to_string(offset + got));
      got += count;
    }
    sum.lines(chunk.get(), wanted / kLine);
    if (wanted < kChunk || bytes == kChunk) return sum.finish(chunk.get() + wanted / kLine * kLine, wanted % kLine);
    offset += wanted;
    bytes -= wanted;
  }
}
