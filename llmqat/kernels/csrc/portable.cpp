// Plain C++: runs everywhere, and defines what the other variants compute.
#define LLMQAT_PLAIN portable_variant
#include "plain.inc"
