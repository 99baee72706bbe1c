#include "pool.h"

#include <pthread.h>

#include <algorithm>
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

constexpr int MAX_SHARES = 256;

// The chunks of one thread, which takes those of others when it has done its own.
struct alignas(64) Share {
    // The number of chunks not claimed yet. What else describes a call changes only while it is not positive, so whoever
    // takes a positive count may read that: the call cannot end before that chunk is done.
    std::atomic<int64_t> unclaimed{0};
    int64_t end = 0;
};

struct Pool {
    Share shares[MAX_SHARES];
    alignas(64) std::atomic<int64_t> done{0};
    alignas(64) std::atomic<uint32_t> calls{0};
    std::atomic<int> sleeping{0};
    std::atomic<int> active{0};  // workers with a lower id take part
    std::mutex owner;
    Task task = nullptr;
    void* context = nullptr;
    int workers = 0;

    int count_shares() const { return std::min(active.load(std::memory_order_relaxed) + 1, MAX_SHARES); }

    // What the thread has done it adds up at the end: that counter belongs to all of them.
    void work_from(int first) {
        const int threads = count_shares();
        int64_t mine = 0;
        for (int i = 0; i < threads; ++i) mine += work(shares[(first + i) % threads]);
        if (mine) done.fetch_add(mine, std::memory_order_release);
    }

    int64_t work(Share& share) {
        int64_t count = 0;
        for (; share.unclaimed.load(std::memory_order_relaxed) > 0; ++count) {
            const int64_t left = share.unclaimed.fetch_sub(1, std::memory_order_acquire);
            if (left <= 0) break;
            task(context, share.end - left);
        }
        return count;
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
            if (id < active.load(std::memory_order_relaxed)) work_from(id + 1);
        }
    }

    void grow(int wanted) {
        active.store(wanted, std::memory_order_relaxed);
        for (; workers < wanted; ++workers) std::thread([this, id = workers] { serve(id); }).detach();
    }

    void run(int64_t count, Task f, void* data) {
        task = f, context = data;
        done.store(0, std::memory_order_relaxed);
        const int64_t threads = count_shares();
        for (int64_t i = 0; i < threads; ++i) {
            const int64_t begin = count * i / threads, end = count * (i + 1) / threads;
            shares[i].end = end;
            shares[i].unclaimed.store(end - begin, std::memory_order_release);
        }
        calls.fetch_add(1);
        if (sleeping.load() > 0) calls.notify_all();
        work_from(0);
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
