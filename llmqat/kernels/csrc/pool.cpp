#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <new>
#include <thread>

namespace llmqat {
namespace {

constexpr auto SPIN = std::chrono::microseconds(50);

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spin until `ready()`, at most SPIN; the clock is read rarely, it costs as much as the wait.
template <class Ready>
bool spin(Ready&& ready) {
    auto start = std::chrono::steady_clock::now();
    do {
        for (int i = 0; i < 64; ++i) {
            if (ready()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() - start < SPIN);
    return ready();
}

thread_local bool inside = false;  // a task: its calls run serially

struct Pool {
    // The number of chunks not claimed yet. Task and context change only while it is not positive, so whoever takes a
    // positive count may read them: the call cannot end before that chunk is done.
    alignas(64) std::atomic<int64_t> unclaimed{0};
    alignas(64) std::atomic<int64_t> done{0};
    alignas(64) std::atomic<uint32_t> calls{0};
    std::atomic<int> sleeping{0};
    std::atomic<int> active{0};  // workers with a lower id take part
    std::mutex owner;
    Task task = nullptr;
    void* context = nullptr;
    int64_t chunks = 0;
    int workers = 0;

    void work() {
        for (;;) {
            if (unclaimed.load(std::memory_order_relaxed) <= 0) return;
            int64_t left = unclaimed.fetch_sub(1, std::memory_order_acquire);
            if (left <= 0) return;
            task(context, chunks - left);
            done.fetch_add(1, std::memory_order_release);
        }
    }

    void serve(int id) {
        inside = true;
        uint32_t seen = 0;
        for (;;) {
            if (!spin([&] { return calls.load(std::memory_order_acquire) != seen; })) {
                sleeping.fetch_add(1);
                calls.wait(seen);
                sleeping.fetch_sub(1);
            }
            seen = calls.load(std::memory_order_acquire);
            if (id < active.load(std::memory_order_relaxed)) work();
        }
    }

    void grow(int wanted) {
        active.store(wanted, std::memory_order_relaxed);
        for (; workers < wanted; ++workers) std::thread([this, id = workers] { serve(id); }).detach();
    }

    void run(int64_t count, Task f, void* data) {
        task = f, context = data, chunks = count;
        done.store(0, std::memory_order_relaxed);
        unclaimed.store(count, std::memory_order_release);
        calls.fetch_add(1);
        if (sleeping.load() > 0) calls.notify_all();
        work();
        auto finished = [&] { return done.load(std::memory_order_acquire) == count; };
        while (!spin(finished)) std::this_thread::yield();
    }
};

std::atomic<int> wanted_threads{1};
Pool* pool = nullptr;

// A forked child has the memory of the pool but not its threads: it starts with a new one. The old one is left alone.
void renew() { pool = new Pool; }

Pool& the_pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        renew();
        pthread_atfork(nullptr, nullptr, renew);
    });
    return *pool;
}

}  // namespace

void set_threads(int threads) { wanted_threads.store(threads < 1 ? 1 : threads); }
int threads() { return wanted_threads.load(); }

void parallel(int64_t chunks, Task task, void* context) {
    int wanted = wanted_threads.load(std::memory_order_relaxed);
    Pool& shared = the_pool();
    std::unique_lock<std::mutex> lock(shared.owner, std::defer_lock);
    if (chunks <= 1 || wanted <= 1 || inside || !lock.try_lock()) {
        for (int64_t i = 0; i < chunks; ++i) task(context, i);
        return;
    }
    inside = true;
    shared.grow(wanted - 1);
    shared.run(chunks, task, context);
    inside = false;
}

}  // namespace llmqat
