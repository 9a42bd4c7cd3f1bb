// What the bindings call. Every function starts kernels on call.stream and returns.
#pragma once

#include "table.h"

namespace xattn::cuda {

void linear_forward(const LinearProblem& problem, const Call& call);
void linear_backward(const LinearProblem& problem, const LinearGradients& gradients, const Call& call);
void softmax_forward(const SoftmaxProblem& problem, const Call& call);
void softmax_backward(const SoftmaxProblem& problem, const SoftmaxGradients& gradients, const Call& call);

}  // namespace xattn::cuda
