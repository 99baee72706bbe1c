#include "errors.h"

#include <cstdarg>
#include <cstdio>

#include "llmqat.h"

namespace llmqat {
namespace {

thread_local Error last = {"no error"};

}  // namespace

void fail(const char* format, ...) {
    Error error;
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(error.text, sizeof error.text, format, arguments);
    va_end(arguments);
    throw error;
}

void fail_without_memory(size_t bytes) {
    fail("the kernels need %zu MB more memory than the system gives: shorten the input, or use fewer threads",
         (bytes >> 20) + 1);
}

void remember_error(const char* text) noexcept { std::snprintf(last.text, sizeof last.text, "%s", text); }

}  // namespace llmqat

const char* llmqat_error() { return llmqat::last.text; }
