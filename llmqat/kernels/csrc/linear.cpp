#include "linear.h"

#include <algorithm>
#include <chrono>

#include "cpu.h"
#include "pool.h"

namespace llmqat {
namespace {

// act_bits: 8 means integers where the activations are no finer than the storage dtype of W_hat = scale * code: its
// rounding, which the integers leave out, is then below that of the reference. Else W_hat itself is multiplied.
Path path_of(const Matrix& w, const Variant& v, int32_t dtype) {
    bool integers = dtype == LLMQAT_BFLOAT16 || w.scale_dtype == LLMQAT_FLOAT32 || dtype == w.scale_dtype;
    if (w.act_bits == 8 && integers) return Path::INTEGER;
    return v.bfloat && w.scale_dtype == LLMQAT_BFLOAT16 ? Path::BFLOAT : Path::FLOAT;
}

int planes_of(int32_t dtype) { return dtype == LLMQAT_BFLOAT16 ? 1 : dtype == LLMQAT_FLOAT16 ? 2 : 3; }

// Token m as float32, quantized and back if the layer was trained so and the path does not do it, in the variant's form.
void prepare_token(const Variant& v, const Matrix& w, const Input& in, const void* x, int32_t dtype, int64_t m) {
    thread_local Scratch row_scratch, code_scratch;
    float* row = in.path == Path::FLOAT ? in.x + m * in.k_pad : row_scratch.get<float>(size_t(in.k_pad));
    int64_t known = m < in.m ? in.k : 0;
    v.steps->load(x, m * in.k, known, dtype, row);
    std::fill(row + known, row + in.k_pad, 0.0f);
    if (w.act_bits == 8 && in.path != Path::INTEGER) {
        int8_t* codes = code_scratch.get<int8_t>(size_t(in.k));
        float scale = v.quantize(row, in.k, codes);
        for (int64_t i = 0; i < in.k; ++i) row[i] = round_to(float(codes[i]) * scale, dtype);
    }
    v.pack(w, in, m, row);
}

// fixed: as integers, if the variant wants that.
Input prepare(const Variant& v, const Matrix& w, const void* x, int64_t m, int32_t dtype, bool fixed) {
    thread_local Scratch floats, parts, integers, unit, excess, q, q_scale, lane_sum;
    thread_local std::atomic<bool> rough;
    Input in = {};
    in.path = path_of(w, v, dtype), in.tiled = v.tiles(w, in.path, m);
    in.m = m, in.k = w.in, in.k_pad = round_up(w.in, K_PAD), in.m_pad = in.tiled ? round_up(m, TILE_ROWS) : m;
    in.planes = planes_of(dtype);
    size_t elements = size_t(in.m_pad * in.k_pad);
    if (in.path == Path::BFLOAT && in.tiled) in.parts = parts.get<uint16_t>(elements * size_t(in.planes));
    fixed = fixed && in.path == Path::BFLOAT && !in.tiled && dtype == LLMQAT_BFLOAT16 && v.fixed && v.fixed(w);
    if (in.path != Path::INTEGER && !in.tiled && !fixed) in.x = floats.get<float>(elements);
    if (fixed) {
        in.fixed = integers.get<int16_t>(elements), in.unit = unit.get<float>(elements / K_PAD);
        in.excess = excess.get<int32_t>(elements / 4), in.rough = &rough;
        rough = false;
    }
    if (in.path == Path::INTEGER) {
        in.q = q.get<int8_t>(elements), in.q_scale = q_scale.get<float>(size_t(in.m_pad));
        in.lane_sum = lane_sum.get<float>(in.tiled ? 0 : elements / 4);
    }
    constexpr int64_t TOKENS = 8;
    parallel_for((in.m_pad + TOKENS - 1) / TOKENS, [&](int64_t chunk) {
        int64_t end = std::min((chunk + 1) * TOKENS, in.m_pad);
        for (int64_t i = chunk * TOKENS; i < end; ++i) prepare_token(v, w, in, x, dtype, i);
    });
    return in;
}

// Rows a thread takes at a time: enough bytes to amortize the claim and to keep streams long, and at least some chunks
// for every thread. Tiles come in 32 rows.
int64_t chunk_rows(const Matrix& w, const Input& in, int64_t total_rows) {
    constexpr int64_t BYTES = 512 << 10, CHUNKS_PER_THREAD = 4;
    if (in.tiled) return in.m >= 128 && total_rows >= 128 * 4 * threads() ? 128 : 32;
    int64_t by_size = BYTES / std::max<int64_t>(w.row_bytes, 1), by_share = total_rows / (threads() * CHUNKS_PER_THREAD);
    return round_up(std::max<int64_t>(std::min(by_size, by_share), 4), 4);
}

// Whether two layers read their input in the same form.
bool share_input(const Matrix& a, const Matrix& b) {
    return a.in == b.in && a.groups == b.groups && a.bits == b.bits && a.scale_dtype == b.scale_dtype &&
           a.act_bits == b.act_bits && !a.zero_point == !b.zero_point;
}

}  // namespace

void linear(const Job* jobs, int count, const void* x, int64_t m, int32_t dtype) {
    constexpr int MAX_JOBS = 8;
    if (m == 0 || count == 0) return;
    int shared = 1;
    while (shared < count && share_input(*jobs[0].w, *jobs[shared].w)) ++shared;
    if (shared < count) {
        linear(jobs + shared, count - shared, x, m, dtype);
        count = shared;
    }
    const Variant& v = variant();
    Input in = prepare(v, *jobs[0].w, x, m, dtype, true);
    if (in.fixed && *in.rough) in = prepare(v, *jobs[0].w, x, m, dtype, false);
    int64_t total = 0, first[MAX_JOBS + 1] = {};
    for (int j = 0; j < count; ++j) total += jobs[j].w->out;
    int64_t step = chunk_rows(*jobs[0].w, in, total);
    for (int j = 0; j < count; ++j) first[j + 1] = first[j] + (jobs[j].w->out + step - 1) / step;
    parallel_for(first[count], [&](int64_t chunk) {
        int j = 0;
        while (chunk >= first[j + 1]) ++j;
        int64_t n0 = (chunk - first[j]) * step;
        v.rows(*jobs[j].w, in, jobs[j].out, n0, std::min(n0 + step, jobs[j].w->out));
    });
}

}  // namespace llmqat

extern "C" {

void llmqat_set_threads(int32_t threads) { llmqat::set_threads(threads); }

void llmqat_linear(const llmqat_matrix* matrix, const void* x, void* y, int64_t m, int32_t dtype) {
    llmqat::Job job = {matrix, {y, matrix->out, dtype}};
    llmqat::linear(&job, 1, x, m, dtype);
}

void llmqat_rows(const llmqat_matrix* matrix, const int64_t* index, int64_t count, void* y, int32_t dtype) {
    const llmqat::Steps& steps = *llmqat::variant().steps;
    llmqat::parallel_for(count, [&](int64_t i) { steps.row(*matrix, index[i], y, i * matrix->in, dtype); });
}

double llmqat_read_bandwidth(const void* data, int64_t bytes) {
    constexpr int64_t CHUNK = 1 << 20;
    const auto* words = static_cast<const uint64_t*>(data);
    static volatile uint64_t sink;
    auto start = std::chrono::steady_clock::now();
    llmqat::parallel_for(bytes / CHUNK, [&](int64_t chunk) {
        // Four streams, so that the prefetchers run as well as in the kernels.
        constexpr int64_t QUARTER = CHUNK / 4 / 8;
        const uint64_t* p = words + chunk * (CHUNK / 8);
        uint64_t sum[32] = {};
        for (int64_t i = 0; i < QUARTER; i += 8)
            for (int s = 0; s < 4; ++s) {
                __builtin_prefetch(p + s * QUARTER + i + 256);
                for (int j = 0; j < 8; ++j) sum[s * 8 + j] += p[s * QUARTER + i + j];
            }
        uint64_t total = 0;
        for (uint64_t part : sum) total += part;
        sink = sink + total;
    });
    std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    return double(bytes / CHUNK * CHUNK) / seconds.count();
}
}
