// A thread pool that survives a busy machine.
//
// Work is cut into chunks, in as many equal shares as there are threads. A thread claims those of its share one by one,
// then those of others, and a call ends when its chunks are done - not when every thread has been scheduled, which is what
// makes OpenMP collapse beside one foreign process. Idle threads spin for some tens of microseconds (the gap between two
// layers), then sleep.
#pragma once

#include <cstdint>

namespace llmqat {

using Task = void (*)(void* context, int64_t chunk);

// Threads of the next calls, the calling one included; beyond MAX_THREADS more would only wait for memory. Returns how many
// there will be: fewer, too, once the system has refused to start one.
constexpr int MAX_THREADS = 256;
int set_threads(int64_t threads);
int threads();

// Run task(context, i) for i in [0, chunks), on the calling thread and the pool, or on as many threads as the system starts.
// Calls from a task run serially. The first exception of a task is thrown again here, when all have ended.
void parallel(int64_t chunks, Task task, void* context);

template <class Body>
void parallel_for(int64_t chunks, const Body& body) {
    parallel(chunks, [](void* context, int64_t i) { (*static_cast<const Body*>(context))(i); }, const_cast<Body*>(&body));
}

}  // namespace llmqat
