// The cross-attention block in parts: what its kernels take, and where they are started.
#pragma once

#include "states.h"

namespace xattn::cuda {

// Weights as block_fwd.cu's kernels want them: (sets, 5, padded, padded) matrices, of bfloat16 in cores of 8 x 8
// (block_chain.h), of float row by row; then (sets, 5, padded) biases, float. `padded` is channels rounded up to 16,
// the padding of matrices zero, that of biases -1e30.
struct PackedBlock {
  const char* matrices;
  const float* biases;
};
enum Projection : int { kQuery1, kQuery2, kKey1, kKey2, kValue, kProjections };

// Sources: pairs of a slot and a set of weights, each of which has sums of its own.
struct BlockSources {
  Dtype dtype;
  bool tf32;
  PackedBlock packed;
  int64_t batch, channels;
  int64_t count, longest;  // pairs, and tokens of the longest slot
  int features, pairs;     // in the table: views of slots; slots and weights of pairs
  int keys, values;        // views of stored keys and values of pairs, where they are stored
};

// Partial sums of all chunks in one launch, for bfloat16 where an instance fits: tokens of a chunk; 0: none fits.
int64_t chunk_of_sources(const BlockSources& sources);
void start_sources(const BlockSources& sources, const Table& table, const Chunks& chunks, float* partial,
                   Stream stream);
// Else keys and values of all pairs are stored, to the views of the table: rows of channels, of bfloat16 (chain) or
// float (plain). Their states are those of linear cross-attention.
void start_chain_projections(const BlockSources& sources, const Table& table, Stream stream);
void start_plain_projections(const BlockSources& sources, const Table& table, Stream stream);

// Sums of all chunks of the pairs of every output, as an operand: (outputs, batch) matrices like those of weights,
// and Z, (outputs, batch, padded).
struct BlockStates {
  char* s;
  float* z;
};
void sum_block_states(Dtype dtype, int64_t outputs, int lists, const Table& table, const Chunks& chunks,
                      const float* partial, const BlockStates& states, Stream stream);

// Targets: a query slot, a set of weights, and outputs from lists[i] to lists[i + 1].
struct BlockTargets {
  Dtype dtype;
  bool tf32;
  PackedBlock packed;
  BlockStates states;
  int64_t batch, channels;
  float eps;
  int64_t count, longest;
  int features, outputs, pairs, lists;  // in the table
};
// In bfloat16, of at most `outputs` outputs each, or in float.
void start_chain_targets(const BlockTargets& targets, int64_t outputs, const Table& table, Stream stream);
void start_plain_targets(const BlockTargets& targets, const Table& table, Stream stream);
// Outputs of a target at most; more are divided into several targets.
int64_t chain_outputs(int64_t channels);

XATTN_BOTH int64_t padded_channels(int64_t channels) { return (channels + 15) / 16 * 16; }

// Tokens of a work, a multiple of `tile`: such that `parallel` times as many works as that gives end together on
// `resident` blocks, as early as possible. Beginning and ending a work takes `overhead` hundredths of a tile's time.
int64_t choose_tokens(int64_t longest, int64_t parallel, int64_t tile, int64_t resident, int64_t overhead = 100);

// As many works, or an error: kernels number them by int.
int64_t checked_works(int64_t works, const char* kernel);

}  // namespace xattn::cuda
