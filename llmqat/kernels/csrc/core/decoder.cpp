#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "checks.h"
#include "cpu.h"
#include "errors.h"
#include "linear.h"
#include "pool.h"

namespace llmqat {
namespace {

int64_t width(int32_t dtype) { return dtype == LLMQAT_FLOAT32 ? 4 : 2; }

Cached keys(const llmqat_cache& cache) { return {cache.keys, cache.key_scale}; }

Cached values(const llmqat_cache& cache) { return {cache.values, cache.value_scale}; }

// Activations of one call: everything a block needs, reused by all blocks.
struct Buffers {
    char *normed, *joined, *q, *k, *v, *attended, *output_gate, *gate, *up, *out;

    Buffers(const llmqat_decoder& d, int64_t m) {
        thread_local Scratch scratch;
        int64_t queries = 0, keys = 0, intermediate = d.side;
        for (const llmqat_block* b = d.blocks; b < d.blocks + d.count; ++b) {
            queries = std::max(queries, d.heads * b->head_dim), keys = std::max(keys, b->kv_heads * b->head_dim);
            intermediate = std::max(intermediate, b->gate.out);
        }
        const int64_t gates = d.output_gate ? queries : 0;
        const int64_t sizes[] = {d.hidden, 2 * gates, queries, keys, keys, queries, gates, intermediate, intermediate, d.hidden};
        char** const fields[] = {&normed, &joined, &q, &k, &v, &attended, &output_gate, &gate, &up, &out};
        int64_t total = 0;
        for (int64_t size : sizes) total += round_up(size * m * width(d.dtype), 64);
        char* next = scratch.get<char>(size_t(total));
        for (int i = 0; i < 10; ++i) *fields[i] = next, next += round_up(sizes[i] * m * width(d.dtype), 64);
    }
};

struct Pass {
    const llmqat_decoder& d;
    const Steps& steps;
    Buffers b;
    const llmqat_sequence* sequences;
    int64_t count, m;  // of sequences: one, or m with a token each
    const llmqat_rotary* rotary;
    const char* side;
    llmqat_mix mix;
    void* hidden;

    // The sequence of token t, and where the token stands in it.
    const llmqat_sequence& sequence(int64_t t) const { return sequences[count == 1 ? 0 : t]; }

    int64_t position(int64_t t) const { return sequence(t).past + (count == 1 ? t : 0); }

    Output to(char* y, const Matrix& w) const { return {y, w.out, d.dtype}; }

    NormKind kind() const { return {d.eps, d.norm_offset, d.norm_rounds_once != 0}; }

    void norm(const void* x, const void* weight, void* y, int64_t count) const {
        const Norm norm = {x, weight, y, count, kind(), d.dtype};
        parallel_for(m, [&](int64_t t) { steps.norm(norm, t); });
    }

    // What a branch reads: the residual, after the norm if it has one.
    const void* read(const void* weight) const {
        if (!weight) return hidden;
        norm(hidden, weight, b.normed, d.hidden);
        return b.normed;
    }

    void scale(float factor) const {
        parallel_for(m, [&](int64_t t) { steps.scale(hidden, t * d.hidden, d.hidden, d.dtype, factor); });
    }

    void add(const void* weight) const {
        if (weight) norm(b.out, weight, b.out, d.hidden);
        parallel_for(m, [&](int64_t t) { steps.add(hidden, b.out, t * d.hidden, d.hidden, d.dtype, d.residual_scale); });
    }

    void rope(const llmqat_block& block, int64_t number) const {
        const int64_t dim = block.head_dim, heads = block.kv_heads, group = d.heads / heads;
        const llmqat_rotary still = {};
        const void *q_norm = block.q_norm, *k_norm = block.k_norm;
        if (d.head_norm == OF_ALL_HEADS) {
            if (q_norm) norm(b.q, q_norm, b.q, d.heads * dim);
            if (k_norm) norm(b.k, k_norm, b.k, heads * dim);
            q_norm = k_norm = nullptr;
        }
        auto turn = [&](char* x, const void* head_norm, const llmqat_rotary& table, int64_t t, int64_t start) {
            steps.rope({x, head_norm, table.cosine, table.sine, x, start, start, t, dim, table.dim, kind(), d.dtype,
                        table.dtype, d.head_norm == OF_ROTATED_HEAD, d.neighbours != 0});
        };
        parallel_for(m * heads, [&](int64_t i) {
            const int64_t t = i / heads, row = i % heads * sequence(t).capacity + position(t);
            const llmqat_cache& cache = sequence(t).cache[number];
            for (int64_t h = i * group; h < (i + 1) * group; ++h) {
                if (d.output_gate) part(h, dim);
                turn(b.q, q_norm, rotary[block.query_rotary], t, h * dim);
            }
            if (!block.k.codes) return;
            if (!block.v.codes) std::memcpy(at(b.v, i * dim), at(b.k, i * dim), size_t(dim * width(d.dtype)));
            if (block.v_norm) turn(b.v, block.v_norm, still, t, i * dim);
            turn(b.k, k_norm, rotary[block.rotary], t, i * dim);
            steps.cache(b.k, i * dim, dim, d.dtype, keys(cache), row);
            steps.cache(b.v, i * dim, dim, d.dtype, values(cache), row);
        });
    }

    char* at(char* x, int64_t element) const { return x + element * width(d.dtype); }

    // The query of a head and token, and the gate of what it attends, each to its own place.
    void part(int64_t h, int64_t dim) const {
        const size_t bytes = size_t(dim * width(d.dtype));
        std::memcpy(at(b.q, h * dim), at(b.joined, 2 * h * dim), bytes);
        std::memcpy(at(b.output_gate, h * dim), at(b.joined, (2 * h + 1) * dim), bytes);
    }

    // Of `tokens` new tokens from t on, in the sequence of t.
    Attention attention_of(const llmqat_block& block, int64_t number, int64_t t, int64_t tokens) const {
        const llmqat_sequence& own = sequence(t);
        const llmqat_cache& cache = own.cache[number];
        const int64_t start = t * d.heads * block.head_dim;
        return {at(b.q, start), keys(cache), values(cache), at(b.attended, start), tokens, own.past, own.capacity,
                block.window, d.heads, block.kv_heads, block.head_dim, d.attention_scale, d.softcap, d.dtype};
    }

    void attend(const llmqat_block& block, int64_t number) const {
        const int64_t kv_heads = block.kv_heads;
        if (m == count) {
            // Heads that share keys go together.
            const int64_t group = d.heads / kv_heads, parts = (group + ATTEND_HEADS - 1) / ATTEND_HEADS;
            return parallel_for(m * kv_heads * parts, [&](int64_t i) {
                const Attention a = attention_of(block, number, i / (kv_heads * parts), 1);
                i %= kv_heads * parts;
                int64_t head = i / parts * group + i % parts * ATTEND_HEADS, end = (i / parts + 1) * group;
                steps.attend_decode(a, head, std::min(ATTEND_HEADS, end - head));
            });
        }
        const Attention a = attention_of(block, number, 0, m);
        const int64_t tiles = (m + ATTEND_QUERIES - 1) / ATTEND_QUERIES;
        // The last queries see the most keys: start with them, so that the threads end together.
        parallel_for(tiles * kv_heads, [&](int64_t i) {
            steps.attend_prefill(a, i % kv_heads, (tiles - 1 - i / kv_heads) * ATTEND_QUERIES);
        });
    }

    // gate = activation(gate) * up, for `features` of each token.
    void open(int32_t activation, char* gate, const char* up, int64_t features) const {
        constexpr int64_t PART = 1024;
        const int64_t total = m * features;
        parallel_for((total + PART - 1) / PART, [&](int64_t i) {
            steps.gate(activation, gate, up, i * PART, std::min(PART, total - i * PART), d.dtype);
        });
    }

    // The branch of the side input of block i: a gate for it, which reads the residual as it is.
    void add_side(const llmqat_block& block, int64_t i) const {
        const Job gate = {&block.side_gate, to(b.gate, block.side_gate)};
        linear(&gate, 1, hidden, m, d.dtype);
        parallel_for(m, [&](int64_t t) {
            const char* own = side + (t * d.count + i) * d.side * width(d.dtype);
            steps.gate(d.activation, at(b.gate, t * d.side), own, 0, d.side, d.dtype);
        });
        const Job up = {&block.side_up, to(b.out, block.side_up)};
        linear(&up, 1, b.gate, m, d.dtype);
        add(block.side_norm);
    }

    void attention(const llmqat_block& block, int64_t number, const void* x) const {
        const Job reads[] = {{&block.q, to(d.output_gate ? b.joined : b.q, block.q)}, {&block.k, to(b.k, block.k)},
                             {&block.v, to(b.v, block.v)}};
        linear(reads, block.v.codes ? 3 : block.k.codes ? 2 : 1, x, m, d.dtype);
        rope(block, number);
        attend(block, number);
        if (d.output_gate) open(SIGMOID, b.output_gate, b.attended, d.heads * block.head_dim);
        const Job output = {&block.o, to(b.out, block.o)};
        linear(&output, 1, d.output_gate ? b.output_gate : b.attended, m, d.dtype);
    }

    void block(int64_t i) const {
        const llmqat_block& block = d.blocks[i];
        const void* x = read(block.input_norm);
        if (block.q.codes) attention(block, i, x);
        else if (mix(i, x, m, b.out)) fail("what stands in the place of attention in block %lld failed", (long long)i);
        add(block.attended_norm);
        x = read(block.mlp_norm);
        const Job gated[] = {{&block.gate, to(b.gate, block.gate)}, {&block.up, to(b.up, block.up)}};
        linear(gated, 2, x, m, d.dtype);
        open(d.activation, b.gate, b.up, block.gate.out);
        const Job down = {&block.down, to(b.out, block.down)};
        linear(&down, 1, b.gate, m, d.dtype);
        add(block.mlp_out_norm);
        if (block.side_gate.codes) add_side(block, i);
        if (block.scale) scale(load(block.scale, 0, d.dtype));
    }
};

// Embeddings in, last norm out: see llmqat_decode.
void decode(const llmqat_decoder& d, const llmqat_sequence* sequences, int64_t count, int64_t m,
            const llmqat_rotary* rotary, const void* side, llmqat_mix mix, void* hidden) {
    Pass pass = {d, *variant().steps, Buffers(d, m), sequences, count, m, rotary, static_cast<const char*>(side), mix, hidden};
    if (d.embedding_scale != 1.0f) pass.scale(d.embedding_scale);
    for (int64_t i = 0; i < d.count; ++i) pass.block(i);
    pass.norm(hidden, d.norm, hidden, d.hidden);
}

void embed(const llmqat_greedy& g, int64_t token) {
    const llmqat_decoder& d = *g.decoder;
    if (g.embedding) return variant().steps->row(*g.embedding, token, g.hidden, 0, d.dtype);
    const int64_t bytes = d.hidden * width(d.dtype);
    std::memcpy(g.hidden, static_cast<const char*>(g.embedding_rows) + token * bytes, size_t(bytes));
}

// The rotary tables from `position` on.
const llmqat_rotary* rotary_at(const llmqat_greedy& g, int64_t position) {
    thread_local Scratch scratch;
    llmqat_rotary* tables = scratch.get<llmqat_rotary>(size_t(g.rotary_tables));
    for (int64_t i = 0; i < g.rotary_tables; ++i) {
        const llmqat_rotary& all = g.rotary[i];
        const int64_t bytes = position * all.dim * width(all.dtype);
        tables[i] = {static_cast<const char*>(all.cosine) + bytes, static_cast<const char*>(all.sine) + bytes, all.dim,
                     all.dtype};
    }
    return tables;
}

int64_t argmax(const void* x, int64_t count, int32_t dtype) {
    constexpr int64_t CHUNK = 2048;
    thread_local Scratch scratch;
    const Steps& steps = *variant().steps;
    const int64_t chunks = (count + CHUNK - 1) / CHUNK;
    float* largest = scratch.get<float>(size_t(chunks));
    parallel_for(chunks, [&](int64_t i) {
        largest[i] = steps.largest(x, i * CHUNK, std::min(CHUNK, count - i * CHUNK), dtype);
    });
    const float* best = std::max_element(largest, largest + chunks, [](float a, float b) {
        return a < b || (!std::isnan(a) && std::isnan(b));
    });
    auto found = [&](float value) { return value == *best || (std::isnan(value) && std::isnan(*best)); };
    int64_t i = (best - largest) * CHUNK;
    while (!found(load(x, i, dtype))) ++i;
    return i;
}

int64_t next_token(const llmqat_greedy& g, int64_t token, int64_t past) {
    const int32_t dtype = g.decoder->dtype;
    set_threads(g.threads);
    embed(g, token);
    const llmqat_sequence sequence = {g.cache, g.capacity, past};
    decode(*g.decoder, &sequence, 1, 1, rotary_at(g, past), nullptr, g.mix, g.hidden);
    const Job head = {g.head, {g.logits, g.head->out, dtype}};
    linear(&head, 1, g.hidden, 1, dtype);
    return argmax(g.logits, g.head->out, dtype);
}

}  // namespace
}  // namespace llmqat

extern "C" {

int32_t llmqat_decode(const llmqat_decoder* model, const llmqat_sequence* sequences, int64_t count, int64_t m,
                      const llmqat_rotary* rotary, int64_t rotary_tables, const void* side, llmqat_mix mix,
                      void* hidden) {
    return llmqat::guarded([&] {
        llmqat::check_decoder(*model, rotary_tables);
        llmqat::check_sequences(*model, sequences, count, m);
        llmqat::check_rotary(*model, rotary, rotary_tables);
        llmqat::check_side(*model, side);
        llmqat::check_mix(*model, mix);
        if (mix && count > 1) llmqat::fail("what stands in the place of attention takes one sequence, not %lld", (long long)count);
        if (m) llmqat::check_pointer("hidden", hidden);
        llmqat::decode(*model, sequences, count, m, rotary, side, mix, hidden);
        return 0;
    });
}

int64_t llmqat_next_token(const llmqat_greedy* model, int64_t token, int64_t past) {
    return llmqat::guarded([&] {
        llmqat::check_greedy(*model, token, past);
        return llmqat::next_token(*model, token, past);
    });
}

int64_t llmqat_argmax(const void* x, int64_t count, int32_t dtype) {
    return llmqat::guarded([&] {
        llmqat::check_size("number of values", count, 1, INT64_MAX / 8);
        llmqat::check_dtype("x", dtype);
        llmqat::check_pointer("x", x);
        return llmqat::argmax(x, count, dtype);
    });
}
}
