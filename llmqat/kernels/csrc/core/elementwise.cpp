// Norms, gates and rotary embedding of training: checks, and rows divided among threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "checks.h"
#include "cpu.h"
#include "errors.h"
#include "matrix.h"
#include "team.h"
#include "training.h"

namespace llmqat {
namespace {

void check_rows(int64_t rows, int64_t count) {
    check_size("number of rows", rows, 0);
    check_size("values of a row", count, 1);
}

void check_norm(const TrainNorm& n) {
    check_rows(n.rows, n.count);
    check_dtype("x", n.x_dtype);
    check_dtype("weight", n.weight_dtype);
    check_dtype("y", n.y_dtype);
    check_pointer("weight", n.weight);
    if (n.rows) check_pointer("x", n.x);
}

void check_gate(const TrainGate& a) {
    check_rows(a.rows, a.count);
    check_size("stride of rows", a.stride, a.count);
    check_dtype("gate", a.dtype);
    if (a.activation != SILU && a.activation != GELU_TANH) fail("there is no activation %d", int(a.activation));
    if (a.rows) check_pointer("gate", a.gate), check_pointer("up", a.up);
}

void check_rotation(const Rotation& r) {
    check_size("batch", r.batch, 0);
    check_size("heads", r.heads, 1);
    check_size("length", r.length, 0);
    check_size("dim of a head", r.dim, 1, MAX_HEAD_DIM);
    check_size("dim of a rotary table", r.rotary, 2, r.dim);
    if (r.rotary % 2) fail("dim of a rotary table is %lld, it must be even", (long long)r.rotary);
    check_dtype("x", r.x_dtype);
    check_dtype("y", r.y_dtype);
    check_dtype("tables", r.table_dtype);
    if (r.batch * r.length == 0) return;
    check_pointer("x", r.x);
    check_pointer("y", r.y);
    check_pointer("cosine", r.cosine);
    check_pointer("sine", r.sine);
}

// Parts of dweight, each of so many rows, are added up in their order: the sum is the same with any number of threads.
constexpr int64_t MOST_PARTS = 64;

void norm_backward(const TrainNorm& n) {
    const auto back = variant().train->norm_back;
    if (!n.dweight) return each_run(n.rows, rows_of_task(n.count), [&](int64_t first, int64_t last) { back(n, first, last, nullptr); });
    const int64_t length = std::max(rows_of_task(n.count), (n.rows + MOST_PARTS - 1) / MOST_PARTS);
    const int64_t parts = (n.rows + length - 1) / length;
    std::vector<float> sums(size_t(parts * n.count));
    each_run(n.rows, length, [&](int64_t first, int64_t last) { back(n, first, last, &sums[size_t(first / length * n.count)]); });
    std::memset(n.dweight, 0, size_t(n.count) * sizeof(float));
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t i = 0; i < n.count; ++i) n.dweight[i] += sums[size_t(part * n.count + i)];
}

}  // namespace
}  // namespace llmqat

extern "C" {

int32_t llmqat_norm_forward(const llmqat_rms_norm* norm) {
    return llmqat::guarded([&] {
        llmqat::check_norm(*norm);
        if (norm->rows) llmqat::check_pointer("y", norm->y);
        const auto rows = llmqat::variant().train->norm;
        llmqat::each_run(norm->rows, llmqat::rows_of_task(norm->count), [&](int64_t first, int64_t last) { rows(*norm, first, last); });
        return 0;
    });
}

int32_t llmqat_norm_backward(const llmqat_rms_norm* norm) {
    return llmqat::guarded([&] {
        llmqat::check_norm(*norm);
        if (norm->rows) llmqat::check_pointer("g", norm->g), llmqat::check_pointer("inverse", norm->inverse);
        llmqat::norm_backward(*norm);
        return 0;
    });
}

int32_t llmqat_gate_forward(const llmqat_gate* gate) {
    return llmqat::guarded([&] {
        llmqat::check_gate(*gate);
        if (gate->rows) llmqat::check_pointer("y", gate->y);
        const auto row = llmqat::variant().train->gate;
        llmqat::each_row(gate->rows, gate->count, [&](int64_t n) { row(*gate, n); });
        return 0;
    });
}

int32_t llmqat_gate_backward(const llmqat_gate* gate) {
    return llmqat::guarded([&] {
        llmqat::check_gate(*gate);
        if (gate->rows) llmqat::check_pointer("g", gate->g), llmqat::check_pointer("dgate", gate->dgate), llmqat::check_pointer("dup", gate->dup);
        const auto row = llmqat::variant().train->gate_back;
        llmqat::each_row(gate->rows, gate->count, [&](int64_t n) { row(*gate, n); });
        return 0;
    });
}

int32_t llmqat_rotate(const llmqat_rotation* rotation) {
    return llmqat::guarded([&] {
        const llmqat::Rotation& r = *rotation;
        llmqat::check_rotation(r);
        const auto rotate = llmqat::variant().train->rotate;
        llmqat::each_row(r.batch * r.length, r.heads * r.dim, [&](int64_t i) { rotate(r, i / r.length, i % r.length); });
        return 0;
    });
}
}
