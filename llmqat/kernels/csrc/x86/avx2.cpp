// AVX2 with FMA and F16C.
#include "avx2.h"

#define LLMQAT_LANES avx2_variant
#include "lanes/variant.inc"
