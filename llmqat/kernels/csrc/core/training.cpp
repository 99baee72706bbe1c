#include "training.h"

#include "checks.h"
#include "cpu.h"
#include "errors.h"
#include "matrix.h"
#include "team.h"

namespace llmqat {
namespace {

void check_operand(const char* name, const Operand& a) {
    check_pointer(name, a.data);
    check_size("rows of an operand", a.rows, 1);
    check_size("columns of an operand", a.columns, 1);
    const bool by_rows = a.column_stride == 1 && a.row_stride >= a.columns;
    const bool by_columns = a.row_stride == 1 && a.column_stride >= a.rows;
    if (!by_rows && !by_columns)
        fail("%s has strides %lld and %lld: one has to be 1, the other no less than a row", name, (long long)a.row_stride,
             (long long)a.column_stride);
}

void check_product(const Product& out) {
    check_pointer("product", out.c);
    const bool floats = out.dtype == LLMQAT_FLOAT32, known = floats || out.dtype == LLMQAT_BFLOAT16;
    if (!known) fail("a product is float32 or bfloat16, not dtype %d", out.dtype);
    if (out.accumulate && !floats) fail("products are added up in float32 only");
}

void check_sums(const AdapterSums& w) {
    check_size("rows of a weight", w.rows, 0);
    check_size("columns of a weight", w.columns, 1);
    check_size("rank of adapters", w.rank, 1);
    if (w.rows) check_pointer("b", w.b), check_pointer("a", w.a), check_pointer("sums", w.sums);
}

void check_grid(const TrainGrid& w) {
    check_size("rows of a weight", w.rows, 0);
    check_size("columns of a weight", w.columns, 1);
    check_size("groups of a row", w.groups, 1, w.columns);
    if (w.columns % w.groups) fail("%lld columns are no whole number of %lld groups", (long long)w.columns, (long long)w.groups);
    check_dtype("the weight", w.weight_dtype);
    check_dtype("the scale", w.scale_dtype);
    if (w.rows) check_pointer("weight", w.weight), check_pointer("scale", w.scale);
    if (!w.multiples != !w.step) fail("multiples without their step, or a step without multiples");
}

}  // namespace
}  // namespace llmqat

extern "C" {

int32_t llmqat_has_tiles() { return llmqat::variant().multiply != nullptr; }

int32_t llmqat_multiply(const llmqat_operand* a, const llmqat_operand* b, const llmqat_product* out) {
    return llmqat::guarded([&] {
        llmqat::check_operand("the left matrix", *a);
        llmqat::check_operand("the right matrix", *b);
        if (a->columns != b->rows)
            llmqat::fail("%lld columns cannot multiply %lld rows", (long long)a->columns, (long long)b->rows);
        llmqat::check_product(*out);
        if (!llmqat::variant().multiply) llmqat::fail("these kernels have no tiles to multiply with");
        llmqat::variant().multiply(*a, *b, *out);
        return 0;
    });
}

int32_t llmqat_sum_adapters(const llmqat_adapter_sums* sums) {
    return llmqat::guarded([&] {
        llmqat::check_sums(*sums);
        const auto rows = llmqat::variant().train->sum_adapters;
        const int64_t blocks = (llmqat::rows_of_task(sums->columns) - 1) / llmqat::SUMS_ROWS + 1;
        llmqat::each_run(sums->rows, blocks * llmqat::SUMS_ROWS, [&](int64_t first, int64_t last) { rows(*sums, first, last); });
        return 0;
    });
}

int32_t llmqat_fake_quantize(const llmqat_grid* grid, void* w_hat, int32_t dtype) {
    return llmqat::guarded([&] {
        llmqat::check_grid(*grid);
        llmqat::check_dtype("w_hat", dtype);
        if (grid->rows) llmqat::check_pointer("w_hat", w_hat);
        const auto row = llmqat::variant().train->fake_quantize;
        llmqat::each_row(grid->rows, grid->columns, [&](int64_t n) { row(*grid, n, w_hat, dtype); });
        return 0;
    });
}

int32_t llmqat_grid_gradients(const llmqat_grid* grid, float* g, float* ds, void* w_hat, int32_t dtype) {
    return llmqat::guarded([&] {
        llmqat::check_grid(*grid);
        llmqat::check_dtype("w_hat", dtype);
        if (grid->rows) llmqat::check_pointer("g", g), llmqat::check_pointer("ds", ds);
        const auto row = llmqat::variant().train->grid_gradients;
        llmqat::each_row(grid->rows, grid->columns, [&](int64_t n) { row(*grid, n, g, ds, w_hat, dtype); });
        return 0;
    });
}
}
