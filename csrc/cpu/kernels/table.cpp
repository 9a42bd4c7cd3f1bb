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
void block_pack(Dtype, int64_t, int64_t, const void*, const void*, void*);
bool block_forward(const BlockProblem&, int);
void pyramid_forward(const PyramidProblem&, int);
void pyramid_classify(const PyramidProblem&, int);
void pyramid_sums(const PyramidProblem&, const PyramidGradients&, int);
void pyramid_backward(const PyramidProblem&, const PyramidGradients&, int);

extern const Kernels kernels;
const Kernels kernels = {linear_forward,     linear_backward, softmax_forward, softmax_backward,
                         block_packed_bytes, block_pack,      block_forward,   pyramid_forward,
                         pyramid_classify,   pyramid_sums,    pyramid_backward};

}  // namespace XATTN_ISA
}  // namespace xattn
