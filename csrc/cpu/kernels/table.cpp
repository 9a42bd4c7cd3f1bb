#include "table.h"

#ifndef XATTN_ISA
#error "XATTN_ISA names the instruction set; the build sets it"
#endif

namespace xattn {
namespace XATTN_ISA {

void linear_forward(const LinearProblem&, int);
void linear_backward(const LinearProblem&, const LinearGradients&, int);
void softmax_forward(const SoftmaxProblem&, int);
void softmax_backward(const SoftmaxProblem&, const SoftmaxGradients&, int);
size_t block_packed_bytes(Dtype, int64_t, int64_t);
void block_pack(Dtype, int64_t, Span<const FoldedLayer>, double, void*, int);
bool block_forward(const BlockProblem&, int);
void pyramid_forward(const PyramidProblem&, int);
void pyramid_classify(const PyramidProblem&, int);
void pyramid_sums(const PyramidProblem&, const PyramidGradients&, int);
void pyramid_backward(const PyramidProblem&, const PyramidGradients&, int);
void training_moments(const TrainingProblem&, const TrainingResults&, int);
void training_first_moments(const TrainingProblem&, const TrainingResults&, int);
void training_hidden_moments(const TrainingProblem&, const TrainingResults&, int);
void training_states(const TrainingProblem&, const TrainingResults&, int);
void training_attend(const TrainingProblem&, const TrainingResults&, int);
void training_target_sums(const TrainingProblem&, const TrainingResults&, int);
void training_target_gradients(const TrainingProblem&, const TrainingResults&, int);
void training_source_sums(const TrainingProblem&, const TrainingResults&, int);
void training_source_gradients(const TrainingProblem&, const TrainingResults&, int);
void training_input_gradient(const TrainingProblem&, const TrainingResults&, int);

extern const Kernels kernels;
const Kernels kernels = {linear_forward,         linear_backward,           softmax_forward,
                         softmax_backward,       block_packed_bytes,        block_pack,
                         block_forward,          pyramid_forward,           pyramid_classify,
                         pyramid_sums,           pyramid_backward,          training_moments,
                         training_first_moments, training_hidden_moments,   training_states,
                         training_attend,        training_target_sums,      training_target_gradients,
                         training_source_sums,   training_source_gradients, training_input_gradient};

}  // namespace XATTN_ISA
}  // namespace xattn
