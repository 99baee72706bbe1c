// Reads a buffer as fast as the machine gives it: 2 MiB pages, chunks of 1 MiB that threads take as they come free, each
// read in several streams with prefetch.
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { WORDS = 8, AHEAD = 2048, CHUNK = 1 << 20 };

void *buffer_of(size_t bytes) {
  void *data = aligned_alloc(1 << 21, bytes);
  if (!data) return NULL;
  madvise(data, bytes, MADV_HUGEPAGE);
  memset(data, 1, bytes);
  return data;
}

static inline __attribute__((always_inline)) uint64_t read_chunk(const uint64_t *chunk, const int streams) {
  uint64_t sum[8 * WORDS] = {0}, total = 0;
  const size_t stream = CHUNK / 8 / streams;
  for (size_t i = 0; i < stream; i += WORDS)
    for (int s = 0; s < streams; s++) {
      const uint64_t *p = chunk + s * stream + i;
      __builtin_prefetch((const char *)p + AHEAD);
      for (int w = 0; w < WORDS; w++) sum[s * WORDS + w] += p[w];
    }
  for (int i = 0; i < streams * WORDS; i++) total += sum[i];
  return total;
}

// The sum of all words, so that no read can be left out. `bytes` is a multiple of CHUNK; `streams` is 2, 4 or 8.
uint64_t read_all(const void *data, size_t bytes, int threads, int streams) {
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(+ : total)
  for (size_t c = 0; c < bytes / CHUNK; c++) {
    const uint64_t *chunk = (const uint64_t *)data + c * (CHUNK / 8);
    total += streams == 2 ? read_chunk(chunk, 2) : streams == 4 ? read_chunk(chunk, 4) : read_chunk(chunk, 8);
  }
  return total;
}
