// aarch64: the plain loops, vectorized by the compiler (NEON is part of the baseline).
#define LLMQAT_PLAIN neon_variant
#include "plain.inc"
