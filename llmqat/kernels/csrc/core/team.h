// Tasks on the threads of OpenMP, which are torch's own: kernels of training run between operators of torch, whose idle
// threads would spin on the cores of another pool for a millisecond.
#pragma once

#include <algorithm>

#include "pool.h"

namespace llmqat {

// Like `parallel` of pool.h, with as many threads, where the compiler's OpenMP is the one that torch brings (GCC); else
// `parallel` itself.
void in_team(int64_t chunks, Task task, void* context);

template <class Body>
void team_for(int64_t chunks, const Body& body) {
    in_team(chunks, [](void* context, int64_t i) { (*static_cast<const Body*>(context))(i); }, const_cast<Body*>(&body));
}

// Rows of `count` values each that make a task: some thousands of values, so that starting it costs nothing.
inline int64_t rows_of_task(int64_t count) { return std::max<int64_t>(16384 / count, 1); }

// use(first, last) of runs of `length` rows, each a task.
template <class Use>
void each_run(int64_t rows, int64_t length, const Use& use) {
    team_for((rows + length - 1) / length, [&](int64_t i) { use(i * length, std::min((i + 1) * length, rows)); });
}

// use(n) of every row of `count` values, in tasks of some rows.
template <class Use>
void each_row(int64_t rows, int64_t count, const Use& use) {
    each_run(rows, rows_of_task(count), [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; ++n) use(n);
    });
}

}  // namespace llmqat
