// The draw of a token, and checksums of memory.
#include "check.h"

void check_sampling(Outputs& outputs) {
  Random random(8);
  const SamplingRules rules[] = {{1.0, 0, 1, 0.5, 0}, {0.7, 0, 0.9, 0.99, 40}, {1.3, 0.05, 1, 0.0, 0}, {1e-3, 0, 0.5, 1.0, 1}};
  for (const int64_t size : {1, 2, 15, 17, 272, 5000}) {
    const Buffer<float> logits = normals(random, size), stretched = normals(random, size);
    for (const SamplingRules& r : rules) {
      for (const Buffer<float>* row : {&logits, &stretched}) {
        Buffer<int64_t> id(1);
        id[0] = choose_token(row->data(), size, r);
        if (id[0] < 0 || id[0] >= size) fail("chosen token", (double)id[0], (double)size);
        outputs.keep(id);
      }
    }
  }
}

void check_checksums(Outputs& outputs) {
  Random random(9);
  for (const int64_t size : {0, 1, 7, 63, 64, 65, 4096, 300001}) {
    Buffer<char> guarded(size, true), plain(size, false);
    for (int64_t i = 0; i < size; ++i) guarded[i] = plain[i] = (char)random.below(256);
    Buffer<uint64_t> sum(1);
    sum[0] = checksum(guarded.data(), size);
    if (sum[0] != checksum(plain.data(), size)) fail("checksum of the same bytes elsewhere", 0, 1);
    outputs.keep(sum);
  }
}
