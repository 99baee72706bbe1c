// Which instruction sets this machine runs: see llmqat.h.
#pragma once

#include "matrix.h"

namespace llmqat {

// The instruction set in use.
const Variant& variant();

}  // namespace llmqat
