// AVX2 with AVX-VNNI: the integer path with vpdpbusd.
#include "avx2.h"

#define LLMQAT_LANES avxvnni_variant
#define LLMQAT_FLOATS avx2_variant
#include "lanes/variant.inc"
