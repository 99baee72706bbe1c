// aarch64 as it always is: NEON with FMA, integer products in 16 bits.
#include "neon.h"

#define LLMQAT_LANES neon_variant
#include "lanes/variant.inc"
