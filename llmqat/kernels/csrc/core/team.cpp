#include "team.h"

#include <algorithm>
#include <atomic>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace llmqat {

#ifdef _OPENMP
void in_team(int64_t chunks, Task task, void* context) {
    const int wanted = int(std::min<int64_t>(threads(), chunks));
    if (wanted <= 1 || omp_in_parallel()) {
        for (int64_t i = 0; i < chunks; ++i) task(context, i);
        return;
    }
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr failure;  // the first: who sets `failed` writes it
#pragma omp parallel num_threads(wanted)
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
        try {
            task(context, i);
        } catch (...) {
            if (!failed.exchange(true)) failure = std::current_exception();
        }
    }
    if (failed) std::rethrow_exception(failure);
}
#else
void in_team(int64_t chunks, Task task, void* context) { parallel(chunks, task, context); }
#endif

}  // namespace llmqat
