// aarch64 with int8 matrix products (Armv8.6): the integer path with smmla from two tokens on.
#include "neon.h"

#define LLMQAT_LANES i8mm_variant
#define LLMQAT_FLOATS neon_variant
#include "lanes/variant.inc"
