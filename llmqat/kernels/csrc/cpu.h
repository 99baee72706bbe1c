// Which instruction sets this machine runs, and the one in use.
#pragma once

#include "matrix.h"

namespace llmqat {

const Variant& variant();       // in use
const Variant* variant_of(int32_t isa);  // null if it was not compiled in or cannot run here

}  // namespace llmqat
