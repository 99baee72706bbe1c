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
    float* row = in.path == Path::FLOAT ? in.floats.x + m * in.k_pad : row_scratch.get<float>(size_t(in.k_pad));
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

// The activations of one call, on their way to the form that the kernels read.
struct Preparation {
    const Variant& v;
    const Matrix& w;
    const void* x;
    int32_t dtype;
    Input in;  // sizes alone, no form yet

    Preparation(const Variant& variant, const Matrix& matrix, const void* from, int64_t m, int32_t type)
        : v(variant), w(matrix), x(from), dtype(type), in() {
        in.path = path_of(w, v, dtype), in.tiled = v.tiles && v.tiles(w, in.path, m);
        in.m = m, in.k = w.in, in.k_pad = round_up(w.in, K_PAD), in.m_pad = in.tiled ? round_up(m, TILE_ROWS) : m;
    }

    Input prepare() const {
        if (in.path == Path::INTEGER) return prepare_integers();
        if (in.tiled) return prepare_parts();
        const bool wants_fixed = in.path == Path::BFLOAT && dtype == LLMQAT_BFLOAT16 && v.fixed && v.fixed(w);
        return wants_fixed ? prepare_fixed_or_float() : prepare_floats();
    }

private:
    size_t elements() const { return size_t(in.m_pad) * size_t(in.k_pad); }

    // All tokens in the form for which `to` has memory.
    Input packed(const Input& to) const {
        constexpr int64_t TOKENS = 8;
        parallel_for((to.m_pad + TOKENS - 1) / TOKENS, [&](int64_t chunk) {
            const int64_t end = std::min((chunk + 1) * TOKENS, to.m_pad);
            for (int64_t i = chunk * TOKENS; i < end; ++i) prepare_token(v, w, to, x, dtype, i);
        });
        return to;
    }

    Input prepare_integers() const {
        thread_local Scratch q, scale, lane_sum;
        Input to = in;
        to.integers = {q.get<int8_t>(elements()), scale.get<float>(size_t(in.m_pad)),
                       lane_sum.get<float>(in.tiled ? 0 : elements() / 4)};
        return packed(to);
    }

    Input prepare_parts() const {
        thread_local Scratch parts;
        Input to = in;
        to.parts.planes = planes_of(dtype);
        to.parts.x = parts.get<uint16_t>(elements() * size_t(to.parts.planes));
        return packed(to);
    }

    Input prepare_floats() const {
        thread_local Scratch floats;
        Input to = in;
        to.floats.x = floats.get<float>(elements());
        return packed(to);
    }

    // As integers, which are faster, unless 16 bits lose too much of some token.
    Input prepare_fixed_or_float() const {
        thread_local Scratch fixed, unit, excess;
        thread_local std::atomic<bool> too_coarse;
        too_coarse = false;
        Input to = in;
        to.fixed = {fixed.get<int16_t>(elements()), unit.get<float>(elements() / K_PAD),
                    excess.get<int32_t>(elements() / 4), &too_coarse};
        packed(to);
        return too_coarse ? prepare_floats() : to;
    }
};

// How the rows of layers that share an input become tasks: as many equal shares as threads, each of the same rows of every
// layer. A share is cut into panels, and these into slices of their runs: a thread reads on where its last slice ended, and
// the last slices are small enough for the threads to end together.
class Tasks {
public:
    Tasks(const Job* jobs, int count, const Input& in) : jobs_(jobs), count_(count), shares_(in.tiled ? 1 : threads()) {
        constexpr int64_t BYTES = 512 << 10;
        int64_t total = 0;
        for (int j = 0; j < count; ++j) total += jobs[j].w->out;
        if (in.tiled) panel_ = in.m >= 128 && total >= 128 * 4 * threads() ? 128 : 32;
        else panel_ = round_up(std::max<int64_t>(BYTES / std::max<int64_t>(jobs[0].w->row_bytes, 1), 1), RUNS * SLICES);
        slices_ = in.tiled ? 1 : SLICES;
        for (int j = 0; j < count; ++j) first_[j + 1] = first_[j] + (share_rows(j) + panel_ - 1) / panel_ * slices_;
    }

    int64_t count() const { return shares_ * first_[count_]; }

    template <class Use>
    void run(int64_t task, Use&& use) const {
        const int64_t share = task / first_[count_], i = task % first_[count_];
        int j = 0;
        while (i >= first_[j + 1]) ++j;
        const int64_t panel = (i - first_[j]) / slices_, slice = (i - first_[j]) % slices_, rows = share_rows(j);
        const int64_t out = std::min((share + 1) * rows, jobs_[j].w->out), begin = share * rows + panel * panel_;
        const int64_t end = std::min(begin + panel_, out), length = Runs::length(end - begin);
        if (begin < end) use(jobs_[j], Runs{begin, end, length * slice / slices_, length * (slice + 1) / slices_});
    }

private:
    static constexpr int MAX_JOBS = 8, SLICES = 2;
    const Job* jobs_;
    int count_;
    int64_t shares_, panel_, slices_, first_[MAX_JOBS + 1] = {};

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
    const Input in = Preparation(v, *jobs[0].w, x, m, dtype).prepare();
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
