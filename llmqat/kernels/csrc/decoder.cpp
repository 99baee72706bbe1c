#include "decoder.h"

#include <algorithm>

#include "cpu.h"
#include "linear.h"
#include "pool.h"

namespace llmqat {
namespace {

int64_t width(int32_t dtype) { return dtype == LLMQAT_FLOAT32 ? 4 : 2; }

Cached keys(const llmqat_cache& cache) { return {cache.keys, cache.key_scale}; }

Cached values(const llmqat_cache& cache) { return {cache.values, cache.value_scale}; }

// Activations of one call: everything a block needs, reused by all blocks.
struct Buffers {
    char *normed, *q, *k, *v, *attended, *gate, *up, *out;

    Buffers(const llmqat_decoder& d, int64_t m) {
        thread_local Scratch scratch;
        const int64_t sizes[] = {d.hidden, d.heads * d.head_dim, d.kv_heads * d.head_dim, d.kv_heads * d.head_dim,
                                 d.heads * d.head_dim, d.intermediate, d.intermediate, d.hidden};
        char** const fields[] = {&normed, &q, &k, &v, &attended, &gate, &up, &out};
        int64_t total = 0;
        for (int64_t size : sizes) total += round_up(size * m * width(d.dtype), 64);
        char* next = scratch.get<char>(size_t(total));
        for (int i = 0; i < 8; ++i) *fields[i] = next, next += round_up(sizes[i] * m * width(d.dtype), 64);
    }
};

struct Pass {
    const llmqat_decoder& d;
    const Steps& steps;
    Buffers b;
    int64_t m, past, capacity;
    const llmqat_rotary* rotary;
    void* hidden;

    Output to(char* y, const Matrix& w) const { return {y, w.out, d.dtype}; }

    void norm(const void* x, const void* weight, void* y) const {
        const Norm norm = {x, weight, y, d.hidden, d.eps, d.norm_offset, d.dtype};
        parallel_for(m, [&](int64_t t) { steps.norm(norm, t); });
    }

    void add(const void* weight) const {
        if (weight) norm(b.out, weight, b.out);
        parallel_for(m, [&](int64_t t) { steps.add(hidden, b.out, t * d.hidden, d.hidden, d.dtype); });
    }

    void rope(const llmqat_block& block, const llmqat_cache& cache) const {
        const int64_t dim = d.head_dim;
        const llmqat_rotary& table = rotary[block.rotary];
        const int64_t group = d.heads / d.kv_heads;
        parallel_for(m * d.kv_heads, [&](int64_t i) {
            const int64_t t = i / d.kv_heads, row = i % d.kv_heads * capacity + past + t;
            Rope r = {b.q, block.q_norm, table.cosine, table.sine, b.q, 0, 0, t, dim, table.dim, d.eps, d.norm_offset,
                      d.dtype};
            for (int64_t h = i * group; h < (i + 1) * group; ++h) {
                r.from_start = r.to_start = h * dim;
                steps.rope(r);
            }
            r.from = r.to = b.k, r.norm = block.k_norm, r.from_start = r.to_start = i * dim;
            steps.rope(r);
            steps.cache(b.k, i * dim, dim, d.dtype, keys(cache), row);
            steps.cache(b.v, i * dim, dim, d.dtype, values(cache), row);
        });
    }

    void attend(const llmqat_cache& cache, int64_t window) const {
        Attention a = {b.q, keys(cache), values(cache), b.attended, m, past, capacity, window, d.heads,
                       d.kv_heads, d.head_dim, d.attention_scale, d.softcap, d.dtype};
        if (m == 1) {
            // Heads that share keys go together.
            const int64_t group = d.heads / d.kv_heads, parts = (group + ATTEND_HEADS - 1) / ATTEND_HEADS;
            return parallel_for(d.kv_heads * parts, [&](int64_t i) {
                int64_t head = i / parts * group + i % parts * ATTEND_HEADS, end = (i / parts + 1) * group;
                steps.attend_one(a, head, std::min(ATTEND_HEADS, end - head));
            });
        }
        int64_t blocks = (m + ATTEND_QUERIES - 1) / ATTEND_QUERIES;
        // The last blocks see the most keys: start with them, so that the threads end together.
        parallel_for(blocks * d.kv_heads, [&](int64_t i) {
            steps.attend_block(a, i % d.kv_heads, (blocks - 1 - i / d.kv_heads) * ATTEND_QUERIES);
        });
    }

    void gate() const {
        constexpr int64_t PART = 1024;
        const int64_t total = m * d.intermediate;
        parallel_for((total + PART - 1) / PART, [&](int64_t i) {
            steps.gate(d.activation, b.gate, b.up, i * PART, std::min(PART, total - i * PART), d.dtype);
        });
    }

    void block(const llmqat_block& block, const llmqat_cache& cache) const {
        norm(hidden, block.input_norm, b.normed);
        const Job reads[] = {{&block.q, to(b.q, block.q)}, {&block.k, to(b.k, block.k)}, {&block.v, to(b.v, block.v)}};
        linear(reads, 3, b.normed, m, d.dtype);
        rope(block, cache);
        attend(cache, block.window);
        const Job output = {&block.o, to(b.out, block.o)};
        linear(&output, 1, b.attended, m, d.dtype);
        add(block.attended_norm);
        norm(hidden, block.mlp_norm, b.normed);
        const Job gated[] = {{&block.gate, to(b.gate, block.gate)}, {&block.up, to(b.up, block.up)}};
        linear(gated, 2, b.normed, m, d.dtype);
        gate();
        const Job down = {&block.down, to(b.out, block.down)};
        linear(&down, 1, b.gate, m, d.dtype);
        add(block.mlp_out_norm);
    }
};

}  // namespace
}  // namespace llmqat

extern "C" void llmqat_decode(const llmqat_decoder* model, const llmqat_cache* cache, int64_t capacity, int64_t past,
                              int64_t m, const llmqat_rotary* rotary, void* hidden) {
    using namespace llmqat;
    Pass pass = {*model, *variant().steps, Buffers(*model, m), m, past, capacity, rotary, hidden};
    for (int64_t i = 0; i < model->count; ++i) pass.block(model->blocks[i], cache[i]);
    pass.norm(hidden, model->norm, hidden);
}
