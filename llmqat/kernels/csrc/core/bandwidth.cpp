// How fast the machine reads memory: the bound of decoding, where every weight is read once for a token.
#include <chrono>

#include "checks.h"
#include "errors.h"
#include "pool.h"

namespace llmqat {
namespace {

constexpr int64_t CHUNK = 1 << 20;

// The sum of one chunk, in four streams, so that the prefetchers run as well as in the kernels.
uint64_t sum_of_chunk(const uint64_t* p) {
    constexpr int64_t QUARTER = CHUNK / 4 / 8;
    uint64_t sum[32] = {}, total = 0;
    for (int64_t i = 0; i < QUARTER; i += 8)
        for (int s = 0; s < 4; ++s) {
            __builtin_prefetch(p + s * QUARTER + i + 256);
            for (int j = 0; j < 8; ++j) sum[s * 8 + j] += p[s * QUARTER + i + j];
        }
    for (uint64_t part : sum) total += part;
    return total;
}

double read_bandwidth(const void* data, int64_t bytes) {
    const auto* words = static_cast<const uint64_t*>(data);
    static volatile uint64_t sink;  // the compiler keeps a sum that is stored
    const auto start = std::chrono::steady_clock::now();
    parallel_for(bytes / CHUNK, [&](int64_t chunk) { sink = sink + sum_of_chunk(words + chunk * (CHUNK / 8)); });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    return double(bytes / CHUNK * CHUNK) / seconds.count();
}

}  // namespace
}  // namespace llmqat

double llmqat_read_bandwidth(const void* data, int64_t bytes) {
    return llmqat::guarded([&] {
        llmqat::check_size("bytes", bytes, llmqat::CHUNK, INT64_MAX);
        llmqat::check_pointer("data", data);
        return llmqat::read_bandwidth(data, bytes);
    });
}
