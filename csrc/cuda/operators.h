// What the bindings call. Every function starts kernels on call.stream and returns.
#pragma once

#include "table.h"

namespace xattn::cuda {

void linear_forward(const LinearProblem& problem, const Call& call);

}  // namespace xattn::cuda
