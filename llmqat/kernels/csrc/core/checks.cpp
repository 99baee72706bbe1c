#include "checks.h"

#include "errors.h"
#include "steps.h"

namespace llmqat {
namespace {

void check_attention(const llmqat_decoder& d, const llmqat_block& b, int64_t rotary_tables) {
    check_size("head_dim", b.head_dim, 1, MAX_HEAD_DIM);
    check_size("heads", d.heads, 1, MAX_SIZE / b.head_dim);
    check_size("kv_heads", b.kv_heads, 1, d.heads);
    if (d.heads % b.kv_heads) fail("%lld kv_heads do not divide %lld heads", (long long)b.kv_heads, (long long)d.heads);
    const int64_t queries = d.heads * b.head_dim, keys = b.kv_heads * b.head_dim;
    check_layer("q", b.q, d.output_gate ? 2 * queries : queries, d.hidden);
    if (b.k.codes) check_layer("k", b.k, keys, d.hidden);
    if (b.v.codes) check_layer("v", b.v, keys, d.hidden);
    if (b.v.codes && !b.k.codes) fail("a block has values of its own, and no keys");
    check_layer("o", b.o, d.hidden, queries);
    check_size("window", b.window, 1, INT64_MAX);
    check_size("number of a rotary table", b.rotary, 0, rotary_tables - 1);
    check_size("number of a rotary table", b.query_rotary, 0, rotary_tables - 1);
}

void check_block(const llmqat_decoder& d, const llmqat_block& b, int64_t rotary_tables) {
    if (b.q.codes) check_attention(d, b, rotary_tables);
    check_size("intermediate", b.gate.out, 1);
    check_layer("gate", b.gate, b.gate.out, d.hidden);
    check_layer("up", b.up, b.gate.out, d.hidden);
    check_layer("down", b.down, d.hidden, b.gate.out);
    if (b.side_gate.codes) {
        check_layer("side_gate", b.side_gate, d.side, d.hidden);
        check_layer("side_up", b.side_up, d.hidden, d.side);
    }
}

}  // namespace

void check_size(const char* name, int64_t size, int64_t least, int64_t most) {
    if (size < least || size > most)
        fail("%s is %lld, the kernels take %lld to %lld", name, (long long)size, (long long)least, (long long)most);
}

void check_dtype(const char* name, int32_t dtype) {
    if (dtype < LLMQAT_FLOAT32 || dtype > LLMQAT_FLOAT16) fail("%s has dtype number %d, there are 0 to 2", name, int(dtype));
}

void check_pointer(const char* name, const void* pointer) {
    if (!pointer) fail("%s has no memory: the pointer is null", name);
}

void check_matrix(const llmqat_matrix& w) {
    check_size("out", w.out, 1);
    check_size("in", w.in, 1);
    check_size("groups", w.groups, 1, w.in);
    if (w.bits != 2 && w.bits != 3 && w.bits != 4 && w.bits != 8) fail("bits is %d, the kernels take 2, 3, 4 or 8", int(w.bits));
    if (w.act_bits != 0 && w.act_bits != 8) fail("act_bits is %d, the kernels take 8, or 0 for none", int(w.act_bits));
    if (w.in % w.groups) fail("%lld groups do not divide %lld inputs", (long long)w.groups, (long long)w.in);
    check_size("row_bytes", w.row_bytes, (w.in * w.bits + 7) / 8);
    check_dtype("scale", w.scale_dtype);
    if (w.bias) check_dtype("bias", w.bias_dtype);
    check_pointer("codes", w.codes);
    check_pointer("scale", w.scale);
}

void check_layer(const llmqat_matrix& w) {
    check_matrix(w);
    const int64_t group = w.in / w.groups;
    if (w.groups > 1 && group % 16) fail("groups of %lld weights: the kernels take a multiple of 16, or one a row", (long long)group);
}

void check_layer(const char* name, const llmqat_matrix& w, int64_t out, int64_t in) {
    check_layer(w);
    if (w.out != out || w.in != in)
        fail("%s is (%lld, %lld), the decoder needs (%lld, %lld)", name, (long long)w.out, (long long)w.in, (long long)out,
             (long long)in);
}

void check_decoder(const llmqat_decoder& d, int64_t rotary_tables) {
    check_size("number of blocks", d.count, 0);
    check_size("hidden", d.hidden, 1);
    check_size("side", d.side, 0);
    check_dtype("decoder", d.dtype);
    if (d.activation != SILU && d.activation != GELU_TANH) fail("there is no activation %d", int(d.activation));
    check_size("number of a kind of norms of q and k", d.head_norm, OF_HEAD, OF_ALL_HEADS);
    check_pointer("norm", d.norm);
    if (d.count) check_pointer("blocks", d.blocks);
    for (int64_t i = 0; i < d.count; ++i) check_block(d, d.blocks[i], rotary_tables);
}

void check_caches(const llmqat_decoder& d, const llmqat_cache* cache, int64_t capacity, int64_t past, int64_t m) {
    check_size("capacity of the cache", capacity, 0);
    check_size("past", past, 0, capacity);
    check_size("number of new tokens", m, 0, capacity - past);
    if (d.count) check_pointer("cache", cache);
    for (int64_t i = 0; i < d.count; ++i) {
        if (!d.blocks[i].q.codes) continue;
        check_pointer("keys", cache[i].keys);
        check_pointer("values", cache[i].values);
        if (!cache[i].key_scale != !cache[i].value_scale) fail("a cache has scales of keys and of values, or none");
    }
}

void check_sequences(const llmqat_decoder& d, const llmqat_sequence* sequences, int64_t count, int64_t m) {
    check_size("number of sequences", count, 1);
    check_pointer("sequences", sequences);
    if (count > 1 && count != m) fail("%lld sequences have one new token each, not %lld", (long long)count, (long long)m);
    for (int64_t i = 0; i < count; ++i)
        check_caches(d, sequences[i].cache, sequences[i].capacity, sequences[i].past, count > 1 ? 1 : m);
}

void check_rotary(const llmqat_decoder& d, const llmqat_rotary* rotary, int64_t count) {
    check_size("number of rotary tables", count, 0);
    if (count) check_pointer("rotary", rotary);
    for (int64_t i = 0; i < count; ++i) {
        check_size("dim of a rotary table", rotary[i].dim, 0, MAX_HEAD_DIM);
        if (rotary[i].dtype != LLMQAT_FLOAT32 && rotary[i].dtype != d.dtype)
            fail("a rotary table has dtype number %d, the decoder takes 0 or its own, %d", int(rotary[i].dtype), int(d.dtype));
        if (rotary[i].dim % 2) fail("dim of a rotary table is %lld, it must be even", (long long)rotary[i].dim);
        if (rotary[i].dim == 0) continue;
        check_pointer("cosine", rotary[i].cosine);
        check_pointer("sine", rotary[i].sine);
    }
    for (const llmqat_block* b = d.blocks; b < d.blocks + d.count; ++b) {
        if (!b->q.codes) continue;
        check_size("dim of a rotary table", rotary[b->rotary].dim, 0, b->head_dim);
        check_size("dim of a rotary table", rotary[b->query_rotary].dim, 0, b->head_dim);
    }
}

void check_side(const llmqat_decoder& d, const void* side) {
    for (int64_t i = 0; i < d.count; ++i)
        if (d.blocks[i].side_gate.codes) check_pointer("side", side);
}

void check_mix(const llmqat_decoder& d, llmqat_mix mix) {
    for (int64_t i = 0; i < d.count; ++i)
        if (!d.blocks[i].q.codes && !mix) fail("block %lld has no attention, and nothing stands in its place", (long long)i);
}

void check_greedy(const llmqat_greedy& g, int64_t token, int64_t past) {
    check_pointer("decoder", g.decoder);
    check_pointer("head", g.head);
    check_pointer("hidden", g.hidden);
    check_pointer("logits", g.logits);
    const llmqat_decoder& d = *g.decoder;
    check_decoder(d, g.rotary_tables);
    check_caches(d, g.cache, g.capacity, past, 1);
    check_rotary(d, g.rotary, g.rotary_tables);
    check_side(d, nullptr);
    check_mix(d, g.mix);
    check_size("vocabulary", g.vocabulary, 1);
    if (g.embedding) check_layer("embedding", *g.embedding, g.vocabulary, d.hidden);
    else check_pointer("embedding", g.embedding_rows);
    check_layer("head", *g.head, g.head->out, d.hidden);
    check_size("token", token, 0, g.vocabulary - 1);
}

}  // namespace llmqat
