#include "cpu.h"

#include <atomic>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace llmqat {
namespace {

constexpr int32_t BEST_FIRST[] = {LLMQAT_AMX, LLMQAT_AVX512, LLMQAT_AVX2, LLMQAT_NEON, LLMQAT_PORTABLE};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

bool has_amx() {
    uint32_t a = 7, b, c = 0, d;
    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    constexpr uint32_t BF16 = 1u << 22, TILE = 1u << 24, INT8 = 1u << 25;
    return has_avx512() && (d & BF16) && (d & TILE) && (d & INT8) && request_amx();
}
#endif

const Variant* find(int32_t isa) {
    switch (isa) {
        case LLMQAT_PORTABLE: return portable_variant();
#if defined(__x86_64__)
        case LLMQAT_AVX2: return has_avx2() ? avx2_variant() : nullptr;
        case LLMQAT_AVX512: return has_avx512() ? avx512_variant() : nullptr;
        case LLMQAT_AMX: return has_amx() ? amx_variant() : nullptr;
#elif defined(__aarch64__)
        case LLMQAT_NEON: return neon_variant();
#endif
        default: return nullptr;
    }
}

std::atomic<const Variant*> in_use{nullptr};

}  // namespace

bool request_amx() {
#if defined(__linux__) && defined(__x86_64__)
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return granted;
#else
    return false;
#endif
}

const Variant& variant() {
    const Variant* now = in_use.load(std::memory_order_relaxed);
    if (!now) in_use.store(now = find(llmqat_best_isa()));
    return *now;
}

}  // namespace llmqat

extern "C" {

int32_t llmqat_best_isa() {
    for (int32_t isa : llmqat::BEST_FIRST)
        if (llmqat::find(isa)) return isa;
    return LLMQAT_PORTABLE;
}

int32_t llmqat_has_isa(int32_t isa) { return llmqat::find(isa) != nullptr; }

int32_t llmqat_use_isa(int32_t isa) {
    const llmqat::Variant* chosen = llmqat::find(isa);
    if (!chosen) return 1;
    llmqat::in_use.store(chosen);
    return 0;
}
}
