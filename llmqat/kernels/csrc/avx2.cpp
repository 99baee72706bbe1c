// AVX2 and FMA: the plain loops, vectorized by the compiler.
#define LLMQAT_PLAIN avx2_variant
#include "plain.inc"
