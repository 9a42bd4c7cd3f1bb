// What the lanes of a warp compute together, from the layouts in cuda/device.h.
#pragma once

#include "twin.h"

namespace xattn::cuda::twin {

// Of one lane. A shuffle's value is replaced by its result.
struct Operands {
  void* result;
  const void *a, *b;
  uint64_t value;
  int number;
};

void exchange_values(Collective kind, Operands* const* lanes);
void load(Operands* const* lanes, bool transposed);
// Of the four matrices that are loaded: how often more than once a bank of 16 bytes is asked for another row.
int conflicts(Operands* const* lanes, const char* shared);
void multiply(Operands* const* lanes, bool bfloat16);

}  // namespace xattn::cuda::twin
