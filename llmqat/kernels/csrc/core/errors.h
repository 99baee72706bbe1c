// Errors: exceptions inside the library; -1 and a message at its C interface, which no exception leaves.
#pragma once

#include <cstddef>
#include <new>

namespace llmqat {

// What is wrong, in one line.
struct Error {
    char text[256];
};

// Throw an Error whose text is that of printf.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);
[[noreturn]] void fail_without_memory(size_t bytes);

// Keep `text` for llmqat_error() of this thread.
void remember_error(const char* text) noexcept;

// What `body`, a function of the C interface, returns; -1 after an error.
template <class Body>
auto guarded(const Body& body) noexcept -> decltype(body()) {
    try {
        return body();
    } catch (const Error& error) {
        remember_error(error.text);
    } catch (const std::bad_alloc&) {
        remember_error("the system gives the kernels no more memory");
    } catch (...) {
        remember_error("an unknown exception");
    }
    return -1;
}

}  // namespace llmqat
