#include "cpu.h"

#include <atomic>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace llmqat {
namespace {

#if defined(__x86_64__)
uint32_t cpuid(uint32_t leaf, uint32_t subleaf, int reg) {
    uint32_t r[4] = {leaf, 0, subleaf, 0};
    asm volatile("cpuid" : "+a"(r[0]), "=b"(r[1]), "+c"(r[2]), "=d"(r[3]));
    return r[reg];
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

bool has_avxvnni() {
    constexpr uint32_t AVX_VNNI = 1u << 4;
    return has_avx2() && cpuid(7, 0, 0) >= 1 && (cpuid(7, 1, 0) & AVX_VNNI);
}

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

bool has_amx() {
    const uint32_t d = cpuid(7, 0, 3);
    constexpr uint32_t BF16 = 1u << 22, TILE = 1u << 24, INT8 = 1u << 25;
    return has_avx512() && (d & BF16) && (d & TILE) && (d & INT8) && request_amx();
}
#elif defined(__aarch64__) && defined(__linux__)
bool has_dotprod() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) & HWCAP2_I8MM); }
#elif defined(__aarch64__)
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif

const Variant* find(int32_t isa) {
    switch (isa) {
        case LLMQAT_PORTABLE: return portable_variant();
#if defined(__x86_64__)
        case LLMQAT_AVX2: return has_avx2() ? avx2_variant() : nullptr;
        case LLMQAT_AVXVNNI: return has_avxvnni() ? avxvnni_variant() : nullptr;
        case LLMQAT_AVX512: return has_avx512() ? avx512_variant() : nullptr;
        case LLMQAT_AMX: return has_amx() ? amx_variant() : nullptr;
#elif defined(__aarch64__)
        case LLMQAT_NEON: return neon_variant();
        case LLMQAT_DOTPROD: return has_dotprod() ? dotprod_variant() : nullptr;
        case LLMQAT_I8MM: return has_i8mm() ? i8mm_variant() : nullptr;
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

const char* llmqat_interface() { return LLMQAT_INTERFACE; }

int32_t llmqat_best_isa() {
    int32_t isa = LLMQAT_AMX;
    while (isa > LLMQAT_PORTABLE && !llmqat::find(isa)) --isa;
    return isa;
}

int32_t llmqat_has_isa(int32_t isa) { return llmqat::find(isa) != nullptr; }

int32_t llmqat_use_isa(int32_t isa) {
    const llmqat::Variant* chosen = llmqat::find(isa);
    if (!chosen) return 1;
    llmqat::in_use.store(chosen);
    return 0;
}
}
