#include "linear.h"

#include <algorithm>

#include "checks.h"
#include "cpu.h"
#include "errors.h"
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

// How the rows of layers that share an input become tasks: as many equal shares as threads, each of the same rows of every
// layer. A share is cut into blocks, and these into slices of their runs: a thread reads on where its last slice ended, and
// the last slices are small enough for the threads to end together.
class Tasks {
public:
    Tasks(const Job* jobs, int count, const Input& in) : jobs_(jobs), count_(count), shares_(in.tiled ? 1 : threads()) {
        constexpr int64_t BYTES = 512 << 10;
        int64_t total = 0;
        for (int j = 0; j < count; ++j) total += jobs[j].w->out;
        if (in.tiled) block_ = in.m >= 128 && total >= 128 * 4 * threads() ? 128 : 32;
        else block_ = round_up(std::max<int64_t>(BYTES / std::max<int64_t>(jobs[0].w->row_bytes, 1), 1), RUNS * SLICES);
        slices_ = in.tiled ? 1 : SLICES;
        for (int j = 0; j < count; ++j) first_[j + 1] = first_[j] + (share_rows(j) + block_ - 1) / block_ * slices_;
    }

    int64_t count() const { return shares_ * first_[count_]; }

    template <class Use>
    void run(int64_t task, Use&& use) const {
        const int64_t share = task / first_[count_], i = task % first_[count_];
        int j = 0;
        while (i >= first_[j + 1]) ++j;
        const int64_t block = (i - first_[j]) / slices_, slice = (i - first_[j]) % slices_, rows = share_rows(j);
        const int64_t out = std::min((share + 1) * rows, jobs_[j].w->out), begin = share * rows + block * block_;
        const int64_t end = std::min(begin + block_, out), length = Runs::length(end - begin);
        if (begin < end) use(jobs_[j], Runs{begin, end, length * slice / slices_, length * (slice + 1) / slices_});
    }

private:
    static constexpr int MAX_JOBS = 8, SLICES = 2;
    const Job* jobs_;
    int count_;
    int64_t shares_, block_, slices_, first_[MAX_JOBS + 1] = {};

    int64_t share_rows(int job) const { return (jobs_[job].w->out + shares_ - 1) / shares_; }
};

// Whether two layers read their input in the same form.
bool share_input(const Matrix& a, const Matrix& b) {
    return a.in == b.in && a.groups == b.groups && a.bits == b.bits && a.scale_dtype == b.scale_dtype &&
           a.act_bits == b.act_bits && !a.zero_point == !b.zero_point;
}

}  // namespace

void linear(const Job* jobs, int count, const void* x, int64_t m, int32_t dtype) {
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
    const Tasks tasks(jobs, count, in);
    parallel_for(tasks.count(), [&](int64_t i) {
        tasks.run(i, [&](const Job& job, const Runs& runs) { v.rows(*job.w, in, job.out, runs); });
    });
}

}  // namespace llmqat

extern "C" {

int32_t llmqat_linear(const llmqat_matrix* matrix, const void* x, void* y, int64_t m, int32_t dtype) {
    return llmqat_linears(matrix, 1, x, y, m, dtype);
}

int32_t llmqat_linears(const llmqat_matrix* matrices, int64_t count, const void* x, void* y, int64_t m, int32_t dtype) {
    return llmqat::guarded([&] {
        llmqat::check_size("number of tokens", m, 0);
        llmqat::check_dtype("x", dtype);
        if (m) llmqat::check_pointer("x", x), llmqat::check_pointer("y", y);
        for (int64_t i = 0; i < count; ++i) {
            llmqat::check_layer(matrices[i]);
            const llmqat::Job job = {matrices + i, {y, matrices[i].out, dtype}};
            llmqat::linear(&job, 1, x, m, dtype);
        }
        return 0;
    });
}

int32_t llmqat_rows(const llmqat_matrix* matrix, const int64_t* index, int64_t count, void* y, int32_t dtype) {
    return llmqat::guarded([&] {
        llmqat::check_matrix(*matrix);
        llmqat::check_size("number of rows", count, 0);
        llmqat::check_dtype("y", dtype);
        if (count) llmqat::check_pointer("index", index), llmqat::check_pointer("y", y);
        for (int64_t i = 0; i < count; ++i) llmqat::check_size("number of a row", index[i], 0, matrix->out - 1);
        const llmqat::Steps& steps = *llmqat::variant().steps;
        llmqat::parallel_for(count, [&](int64_t i) { steps.row(*matrix, index[i], y, i * matrix->in, dtype); });
        return 0;
    });
}
}
