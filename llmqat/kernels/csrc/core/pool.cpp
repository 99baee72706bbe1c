#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <utility>

#include "llmqat.h"

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

// The chunks of one thread, which takes those of others when it has done its own.
struct alignas(64) Share {
    // The number of chunks not claimed yet. What else describes a call changes only while it is not positive, so whoever
    // takes a positive count may read that: the call cannot end before that chunk is done.
    std::atomic<int64_t> unclaimed{0};
    int64_t end = 0;
};

struct Pool {
    Share shares[MAX_THREADS];
    alignas(64) std::atomic<int64_t> done{0};
    alignas(64) std::atomic<uint32_t> calls{0};
    std::atomic<int> sleeping{0};
    std::atomic<int> active{0};  // workers with a lower id take part
    std::mutex owner;
    Task task = nullptr;
    void* context = nullptr;
    int workers = 0;
    std::atomic<int> most_workers{MAX_THREADS - 1};
    std::atomic<bool> failed{false};
    std::exception_ptr failure;  // the first of a call: who sets `failed` writes it

    int count_shares() const { return active.load(std::memory_order_relaxed) + 1; }

    // Count locally and add once at the end: `done` is shared by all threads.
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
            run_task(share.end - left);
        }
        return count;
    }

    // An exception must not leave a thread, and a chunk that failed is done all the same.
    void run_task(int64_t chunk) noexcept {
        try {
            task(context, chunk);
        } catch (...) {
            if (!failed.exchange(true)) failure = std::current_exception();
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
            if (id < active.load(std::memory_order_relaxed)) work_from(id + 1);
        }
    }

    // Where the system starts no more threads, the call runs on those there are, and more are not asked for again.
    void grow(int wanted) {
        for (; workers < std::min(wanted, most_workers.load()); ++workers) {
            try {
                std::thread([this, id = workers] { serve(id); }).detach();
            } catch (...) {
                most_workers = workers;
                break;
            }
        }
        active.store(std::min(wanted, workers), std::memory_order_relaxed);
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
        if (failed.exchange(false)) std::rethrow_exception(std::exchange(failure, nullptr));
    }
};

std::atomic<int> wanted_threads{1};
alignas(Pool) std::byte pool_memory[sizeof(Pool)];  // never destroyed: its threads run until the process ends
Pool* pool = nullptr;

// A forked child has the memory of the pool but not its threads: it starts with a new one, in the same place.
void renew() { pool = new (pool_memory) Pool; }

// Marks the thread as one that runs a task, while it lives.
struct Inside {
    Inside() { inside = true; }
    ~Inside() { inside = false; }
};

Pool& the_pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        renew();
        pthread_atfork(nullptr, nullptr, renew);
    });
    return *pool;
}

}  // namespace

int set_threads(int64_t threads) {
    const int wanted = int(std::clamp<int64_t>(threads, 1, MAX_THREADS));
    wanted_threads.store(wanted);
    return std::min(wanted, the_pool().most_workers.load() + 1);
}
int threads() { return wanted_threads.load(); }

void parallel(int64_t chunks, Task task, void* context) {
    int wanted = wanted_threads.load(std::memory_order_relaxed);
    Pool& shared = the_pool();
    std::unique_lock<std::mutex> lock(shared.owner, std::defer_lock);
    if (chunks <= 1 || wanted <= 1 || inside || !lock.try_lock()) {
        for (int64_t i = 0; i < chunks; ++i) task(context, i);
        return;
    }
    const Inside marked;
    shared.grow(wanted - 1);
    shared.run(chunks, task, context);
}

}  // namespace llmqat

int32_t llmqat_set_threads(int32_t threads) { return llmqat::set_threads(threads); }
