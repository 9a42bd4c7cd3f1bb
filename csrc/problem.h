// The problems that kernels take: plain structs of pointers, strides in elements and edges.
//
// Python has checked every number before it arrives here; kernels only compute.
#pragma once

#include <cstdint>

namespace xattn {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

enum class FeatureMap : int { kSoftplus = 0, kRelu = 1, kElu = 2, kIdentity = 3 };

// A (batch, channels, tokens) tensor of any strides. `data` is null where a gradient is not wanted.
struct View {
  char* data;
  int64_t batch_stride, channel_stride, token_stride;
  int64_t tokens;
};

// `weight` is the projection set of cross_attention_block and 0 elsewhere.
struct Edge {
  int64_t query, source, output, weight;
};

template <class T>
struct Span {
  T* data;
  int64_t size;
  T& operator[](int64_t i) const { return data[i]; }
};

// Edges in the order of their outputs, and their numbers in the order of queries and of sources. Edges of
// slot i of a side are those from begin[i] to begin[i + 1].
struct EdgeList {
  Span<const Edge> all;
  Span<const int64_t> output_begin, by_query, query_begin, by_source, source_begin;
  int64_t query_of(int64_t output) const { return all[output_begin[output]].query; }
  int64_t count(int64_t output) const { return output_begin[output + 1] - output_begin[output]; }
};

// Linear cross-attention. States are contiguous in the compute type (float, or double for
// kFloat64): s is (outputs, batch, value_channels, channels), z is (outputs, batch, channels).
struct LinearProblem {
  Dtype dtype;
  int64_t batch, channels, value_channels;
  FeatureMap feature_map;
  double eps;
  Span<const View> queries, keys, values, outputs;
  EdgeList edges;
  const void *initial_s, *initial_z;  // null: start from zero
  void *state_s, *state_z;
};

struct LinearGradients {
  Span<const View> grad_outputs;
  const void *grad_state_s, *grad_state_z;  // null: no gradient
  Span<const View> queries, keys, values;
  void *initial_s, *initial_z;  // null: not wanted
};

// Softmax cross-attention. lse[o] is (batch, heads, tokens) contiguous in the compute type.
struct SoftmaxProblem {
  Dtype dtype;
  int64_t batch, channels, value_channels, heads;
  double scale;
  Span<const View> queries, keys, values, outputs;
  EdgeList edges;
  Span<void* const> lse;
};

struct SoftmaxGradients {
  Span<const View> grad_outputs;
  Span<void* const> grad_lse;  // null entries: no gradient
  Span<const View> queries, keys, values;
};

// A projection to be packed: weight (C, C) and bias `beta` (C), contiguous in the compute type; with the
// scale `gamma`, mean and variance of a batch norm behind it, all (C), or null pointers.
struct FoldedLayer {
  const void *weight, *gamma, *beta, *mean, *var;
};

// Cross-attention block: projections and linear attention of every edge, for inference. `packed` is
// what the engine's own packing made of the folded weights.
struct BlockProblem {
  Dtype dtype;
  int64_t batch, channels;
  double eps;
  Span<const View> features, outputs;
  EdgeList edges;
  const void* packed;
};

// One level of a pyramid: x is (batch, channels, height * width), weight (channels, hidden) contiguous
// in the compute type.
struct Level {
  View x;
  int64_t channels, height, width;
  const void* weight;
};

// Pyramid projection: z = sum over levels of upsample(W x), output = V relu(scale z + shift) + bias.
// Levels are finest first; everything but x, output and map is contiguous in the compute type.
struct PyramidProblem {
  Dtype dtype;
  int64_t batch, hidden, outputs;
  Span<const Level> levels;
  const void *scale, *shift;                 // (hidden)
  const void *classifier, *classifier_bias;  // (hidden, outputs), (outputs)
  View output;                               // data null: not wanted
  void* map;                                 // z (batch, hidden, tokens) contiguous; null: not stored
  void *mean, *deviations;                   // (hidden), and sums of squared deviations; null: not wanted
};

// With g the gradient of scale z + shift, that of z is scale g + slope (z - mean) + offset.
struct PyramidGradients {
  View grad_output;
  const void *mean, *slope, *offset;  // (hidden)
  void *sums, *map_sums;              // (hidden): of g, and of g (z - mean)
  void* classifier;                   // (hidden, outputs)
  Span<const View> x;
  Span<void* const> weights;  // (hidden, channels) contiguous; null: not wanted
};

// Members in groups: the group of each member, and the members of group i from begin[i] to begin[i + 1].
struct Groups {
  Span<const int64_t> group, members, begin;
  int64_t size() const { return group.size; }
  int64_t of(int64_t i) const { return begin[i + 1] - begin[i]; }
};

// One pass of the cross-attention block in training over pairs of a slot and a set of weights; the passes
// and their equations are those of xattn_kernels/ops/cross_attention_block_training/reference.py, which
// also has the shapes and dtypes. Features, maps and gradients of features have any strides, everything else is
// contiguous; gradients of features are in the compute type as well. What a pass does not take is null.
struct TrainingProblem {
  Dtype dtype;
  int64_t batch, channels;
  double eps;
  Span<const View> features;
  const void* center;
  Groups pairs;  // by slot
  const void *first, *first_affine, *second, *affine;
  Groups outputs;                 // by pair; empty on the side of sources
  const void *state_s, *state_z;  // of outputs; or their gradients, of pairs
  Span<const View> maps;          // outputs, or their gradients
  const void* coefficients;
  const void* precise;             // of pairs, bool
  Span<const View> grad_features;  // data null: not wanted
};

// What a pass gives, null where it does not.
struct TrainingResults {
  void *mean, *deviations;
  void *state_s, *state_z;  // or their gradients
  void *sums, *second, *first, *bias;
};

}  // namespace xattn
