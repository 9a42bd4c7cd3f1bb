// The entry points of one instruction set.
#pragma once

#include <cstddef>

#include "../../problem.h"

namespace xattn {

struct Kernels {
  void (*linear_forward)(const LinearProblem&, int threads);
  void (*linear_backward)(const LinearProblem&, const LinearGradients&, int threads);
  void (*softmax_forward)(const SoftmaxProblem&, int threads);
  void (*softmax_backward)(const SoftmaxProblem&, const SoftmaxGradients&, int threads);
  size_t (*block_packed_bytes)(Dtype, int64_t channels, int64_t weights);
  void (*block_pack)(Dtype, int64_t channels, Span<const FoldedLayer> layers, double eps, void* packed, int threads);
  // False if the weights were packed for another instruction set.
  bool (*block_forward)(const BlockProblem&, int threads);
  // z and what is wanted of it; the output from a stored z; the sums over the gradient of its affine map;
  // and the gradients of levels and weights.
  void (*pyramid_forward)(const PyramidProblem&, int threads);
  void (*pyramid_classify)(const PyramidProblem&, int threads);
  void (*pyramid_sums)(const PyramidProblem&, const PyramidGradients&, int threads);
  void (*pyramid_backward)(const PyramidProblem&, const PyramidGradients&, int threads);
  // The passes of the cross-attention block in training.
  void (*training_moments)(const TrainingProblem&, const TrainingResults&, int threads);
  void (*training_first_moments)(const TrainingProblem&, const TrainingResults&, int threads);
  void (*training_hidden_moments)(const TrainingProblem&, const TrainingResults&, int threads);
  void (*training_states)(const TrainingProblem&, const TrainingResults&, int threads);
  void (*training_attend)(const TrainingProblem&, const TrainingResults&, int threads);
  void (*training_target_sums)(const TrainingProblem&, const TrainingResults&, int threads);
  void (*training_target_gradients)(const TrainingProblem&, const TrainingResults&, int threads);
  void (*training_source_sums)(const TrainingProblem&, const TrainingResults&, int threads);
  void (*training_source_gradients)(const TrainingProblem&, const TrainingResults&, int threads);
  void (*training_input_gradient)(const TrainingProblem&, const TrainingResults&, int threads);
};

}  // namespace xattn
