// The first part of linear cross-attention's backward pass.
#pragma once

#include "states.h"

namespace xattn::cuda {

// Gradients of queries, and for the sums over tokens w = 1 / d and u = -c of every token of an output.
struct QueryGradients {
  Dtype dtype;
  FeatureMap feature_map;
  bool tf32;
  float eps;
  int64_t batch, channels, value_channels;
  int64_t count, outputs, longest;         // queries, outputs, tokens of the longest query
  int64_t most;                            // outputs of a query
  int queries, gradients, results, lists;  // in the table: views; for every query its outputs with a gradient
  const float *s, *z;
  float* weights;  // (outputs, batch, 2, longest); null: not wanted
  int64_t offset;  // of what reserve_query_gradients reserved
};
void reserve_query_gradients(QueryGradients& problem, Scratch& scratch);
void start_query_gradients(const QueryGradients& problem, const Table& table, const Scratch& scratch, Stream stream);

}  // namespace xattn::cuda
