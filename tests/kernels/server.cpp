// Serves a build of the kernels for another processor to tests/kernels/remote.py: requests on stdin, answers on stdout.
//
//     qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu server _kernels.so
//
// Every buffer ends where an unreadable page begins, so that a kernel that reads or writes past its end crashes.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "core/decoder.h"

namespace {

enum Operation : int64_t { HAS_ISA, BEST_ISA, USE_ISA, SET_THREADS, LINEAR, ROWS, ARGMAX };

struct Request {
    int64_t operation, argument;  // LINEAR and ROWS: the argument is the number of tokens; ARGMAX: of values
    int64_t dtype;
    int64_t bytes[6];      // codes, scale, zero points, bias, x or row numbers: they follow; y: the answer
    llmqat_matrix matrix;  // pointers are those of the client
};

void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "server: %s\n", what);
    std::exit(1);
}

class Buffer {
public:
    explicit Buffer(int64_t bytes) : bytes_(size_t(bytes)) {
        size_t page = size_t(sysconf(_SC_PAGESIZE));
        mapped_ = (bytes_ + page - 1) / page * page + page;
        map_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        require(map_ != MAP_FAILED, "out of memory");
        require(mprotect(map_ + mapped_ - page, page, PROT_NONE) == 0, "mprotect failed");
        data = map_ + mapped_ - page - bytes_;
        std::memset(data, 0xff, bytes_);
    }
    ~Buffer() { munmap(map_, mapped_); }
    Buffer(const Buffer&) = delete;
    void read() { require(std::fread(data, 1, bytes_, stdin) == bytes_, "the request ends early"); }
    void write() { require(std::fwrite(data, 1, bytes_, stdout) == bytes_, "cannot answer"); }
    char* data;

private:
    size_t bytes_, mapped_;
    char* map_;
};

template <class F>
F* symbol(void* library, const char* name, F*) {
    void* found = dlsym(library, name);
    require(found != nullptr, name);
    return reinterpret_cast<F*>(found);
}

#define KERNEL(name) symbol(library, #name, &name)

void with_layer(void* library, Request& r) {
    Buffer codes(r.bytes[0]), scale(r.bytes[1]), zero_point(r.bytes[2]), bias(r.bytes[3]), x(r.bytes[4]), y(r.bytes[5]);
    for (Buffer* b : {&codes, &scale, &zero_point, &bias, &x}) b->read();
    llmqat_matrix w = r.matrix;
    w.codes = reinterpret_cast<uint8_t*>(codes.data), w.scale = scale.data;
    w.zero_point = w.zero_point ? reinterpret_cast<uint32_t*>(zero_point.data) : nullptr;
    w.bias = w.bias ? bias.data : nullptr;
    const auto dtype = int32_t(r.dtype);
    int64_t result;
    if (r.operation == LINEAR) result = KERNEL(llmqat_linear)(&w, x.data, y.data, r.argument, dtype);
    else if (r.operation == ROWS)
        result = KERNEL(llmqat_rows)(&w, reinterpret_cast<int64_t*>(x.data), r.argument, y.data, dtype);
    else result = KERNEL(llmqat_argmax)(x.data, r.argument, dtype);
    require(result >= 0, KERNEL(llmqat_error)());
    if (r.operation == ARGMAX) *reinterpret_cast<int64_t*>(y.data) = result;
    y.write();
}

int32_t number(void* library, const Request& r) {
    auto argument = int32_t(r.argument);
    switch (r.operation) {
        case HAS_ISA: return KERNEL(llmqat_has_isa)(argument);
        case BEST_ISA: return KERNEL(llmqat_best_isa)();
        case USE_ISA: return KERNEL(llmqat_use_isa)(argument);
        default: return KERNEL(llmqat_set_threads)(argument);
    }
}

}  // namespace

int main(int count, char** arguments) {
    require(count == 2, "usage: server _kernels.so");
    void* library = dlopen(arguments[1], RTLD_NOW);
    require(library != nullptr, "cannot load the kernels");
    Request r;
    while (std::fread(&r, sizeof r, 1, stdin) == 1) {
        if (r.operation >= LINEAR) with_layer(library, r);
        else {
            int32_t answer = number(library, r);
            require(std::fwrite(&answer, sizeof answer, 1, stdout) == 1, "cannot answer");
        }
        std::fflush(stdout);
    }
}
