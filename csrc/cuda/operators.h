// What the bindings call. Every function starts kernels on call.stream and returns.
#pragma once

#include "table.h"

namespace xattn::cuda {

void linear_forward(const LinearProblem& problem, const Call& call);
void linear_backward(const LinearProblem& problem, const LinearGradients& gradients, const Call& call);
void softmax_forward(const SoftmaxProblem& problem, const Call& call);
void softmax_backward(const SoftmaxProblem& problem, const SoftmaxGradients& gradients, const Call& call);

// Weights of a pyramid as tensors of one sample of any strides: of every level (hidden, channels), and the
// classifier (outputs, hidden). They stand for those of a PyramidProblem, which are not read.
struct PyramidWeights {
  Dtype dtype;
  Span<const View> levels;
  View classifier;
};
// The output, z, its mean and squared deviations: what the problem has an address for.
void pyramid_forward(const PyramidProblem& problem, const PyramidWeights& weights, const Call& call);
// The output of a stored z.
void pyramid_classify(const PyramidProblem& problem, const PyramidWeights& weights, const Call& call);

// `sets` of weights, packed as block.h has it.
void block_forward(const BlockProblem& problem, int64_t sets, const Call& call);

}  // namespace xattn::cuda
