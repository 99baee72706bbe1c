// Tasks on the threads of OpenMP, which are torch's own: kernels of training run between operators of torch, whose idle
// threads would spin on the cores of another pool for a millisecond.
#pragma once

#include "pool.h"

namespace llmqat {

// Like `parallel` of pool.h, with as many threads, where the compiler's OpenMP is the one that torch brings (GCC); else
// `parallel` itself.
void in_team(int64_t chunks, Task task, void* context);

template <class Body>
void team_for(int64_t chunks, const Body& body) {
    in_team(chunks, [](void* context, int64_t i) { (*static_cast<const Body*>(context))(i); }, const_cast<Body*>(&body));
}

}  // namespace llmqat
