#include <algorithm>
#include <cmath>
#include <cstring>

#include "checks.h"
#include "cpu.h"
#include "errors.h"
#include "matrix.h"
#include "team.h"

namespace llmqat {
namespace {

constexpr int64_t MOST_DIM = 256, LEAST_QUERIES = 64;

void check_heads(const char* name, const llmqat_heads& heads) {
    check_pointer(name, heads.data);
    check_size("stride of a sequence", heads.sequence_stride, 0, INT64_MAX);
    check_size("stride of a head", heads.head_stride, 0, INT64_MAX);
    check_size("stride of a row", heads.row_stride, 0, INT64_MAX);
}

void check_seen(const TrainAttention& a) {
    check_pointer("seen", a.seen);
    check_size("stride of seen", a.seen_stride, 0, INT64_MAX);
    for (int64_t s = 0; s < (a.seen_stride ? a.sequences : 1); ++s)
        for (int64_t i = 0; i < a.queries; ++i) {
            const int32_t* range = a.seen + s * a.seen_stride + 2 * i;
            check_size("first key of a query", range[0], 0, a.keys);
            check_size("end of the keys of a query", range[1], 0, a.keys);
        }
}

const AttendTraining& check_attention(const TrainAttention& a) {
    check_size("sequences", a.sequences, 1);
    check_size("queries", a.queries, 1);
    check_size("keys", a.keys, 1);
    check_size("head_dim", a.head_dim, 16, MOST_DIM);
    if (a.head_dim % 16) fail("head_dim is %lld, the kernels take multiples of 16", (long long)a.head_dim);
    check_size("kv_heads", a.kv_heads, 1);
    check_size("heads", a.heads, 1);
    if (a.heads % a.kv_heads) fail("%lld kv_heads do not divide %lld heads", (long long)a.kv_heads, (long long)a.heads);
    if (!(a.scale > 0) || !(a.softcap >= 0))
        fail("scale is %g and softcap %g: one has to be > 0, the other >= 0", a.scale, a.softcap);
    check_heads("q", a.q), check_heads("k", a.k), check_heads("v", a.v), check_heads("out", a.out);
    check_seen(a);
    if (!variant().attend) fail("these kernels have no tiles for attention");
    return *variant().attend;
}

// Finds where the keys of a query start and end in its row of a mask; whether they are one run.
bool run_of(const uint8_t* row, int64_t keys, int32_t* range) {
    const auto* first = static_cast<const uint8_t*>(std::memchr(row, 1, size_t(keys)));
    if (!first) return range[0] = range[1] = 0, true;
    const uint8_t* stop = row + keys;
    const auto* gap = static_cast<const uint8_t*>(std::memchr(first, 0, size_t(stop - first)));
    const uint8_t* end = gap ? gap : stop;
    range[0] = int32_t(first - row), range[1] = int32_t(end - row);
    return !std::memchr(end, 1, size_t(stop - end));
}

}  // namespace
}  // namespace llmqat

extern "C" {

int32_t llmqat_has_attention() { return llmqat::variant().attend != nullptr; }

int32_t llmqat_attend(const llmqat_attention* attention) {
    return llmqat::guarded([&] {
        const llmqat_attention& a = *attention;
        const auto forward = llmqat::check_attention(a).forward;
        // As many parts of the queries as give every thread some tasks.
        const int64_t groups = a.sequences * a.kv_heads, most = (a.queries + llmqat::LEAST_QUERIES - 1) / llmqat::LEAST_QUERIES;
        const int64_t parts = std::clamp<int64_t>((4 * llmqat::threads() + groups - 1) / groups, 1, most);
        const int64_t count = llmqat::round_up((a.queries + parts - 1) / parts, llmqat::LEAST_QUERIES);
        llmqat::team_for(groups * parts, [&](int64_t i) {
            // The last queries first, which see the most.
            const int64_t first = (parts - 1 - i / groups) * count, last = std::min(first + count, a.queries);
            if (first < last) forward(a, i % groups / a.kv_heads, i % a.kv_heads, first, last);
        });
        return 0;
    });
}

int32_t llmqat_attend_backward(const llmqat_attention* attention, const llmqat_attention_gradients* gradients) {
    return llmqat::guarded([&] {
        const llmqat_attention& a = *attention;
        const auto backward = llmqat::check_attention(a).backward;
        llmqat::check_pointer("log_sum", a.log_sum);
        llmqat::check_heads("gradient of out", gradients->out), llmqat::check_heads("gradient of q", gradients->q);
        llmqat::check_heads("gradient of k", gradients->k), llmqat::check_heads("gradient of v", gradients->v);
        llmqat::team_for(a.sequences * a.kv_heads,
                         [&](int64_t i) { backward(a, *gradients, i / a.kv_heads, i % a.kv_heads); });
        return 0;
    });
}

int32_t llmqat_seen_keys(const uint8_t* mask, const int64_t* sizes, const int64_t* strides, int32_t* seen) {
    return llmqat::guarded([&] {
        llmqat::check_pointer("mask", mask), llmqat::check_pointer("seen", seen);
        const int64_t sequences = sizes[0], queries = sizes[1], keys = sizes[2];
        for (int64_t i = 0; i < sequences * queries; ++i) {
            const uint8_t* row = mask + i / queries * strides[0] + i % queries * strides[1];
            if (!llmqat::run_of(row, keys, seen + 2 * i)) return 0;
        }
        return 1;
    });
}
}
