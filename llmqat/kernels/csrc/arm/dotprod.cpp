// aarch64 with the dot products of Armv8.2: the integer path with sdot.
#include "neon.h"

#define LLMQAT_LANES dotprod_variant
#define LLMQAT_FLOATS neon_variant
#include "lanes/variant.inc"
