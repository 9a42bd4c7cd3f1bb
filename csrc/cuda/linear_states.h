// The first stage of linear cross-attention's sums over tokens, forward and backward alike.
#pragma once

#include "states.h"

namespace xattn::cuda {

// For every chunk of tokens n of slot i: S = sum_n w_n v_n phi(k_n)^T and Z = sum_n u_n w_n phi(k_n).
struct LinearStates {
  Dtype dtype;
  FeatureMap feature_map;
  bool tf32;
  int64_t batch, channels, value_channels;
  int keys, values;  // in the table: views of slots; one without values has no chunks
  // w and u, (slots, batch, 2, longest); null: both are one.
  const float* weights;
  int64_t longest;
};

// Tokens of a chunk of slots of at most `longest` tokens.
int64_t linear_chunk(const LinearProblem& problem, int64_t slots, int64_t longest);

void start_linear_states(const LinearStates& problem, const Table& table, const Chunks& chunks, float* partial,
                         Stream stream);

}  // namespace xattn::cuda
