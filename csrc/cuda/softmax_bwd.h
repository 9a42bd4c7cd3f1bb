// What the host of softmax cross-attention's backward pass says to its kernels.
#pragma once

#include "softmax.h"

namespace xattn::cuda {

// Rows of statistics are as long as multiples of this: tiles of them are whole.
constexpr int kStatistics = 64;

struct Statistics {
  float lse, delta;  // to base 2; D
};

// Offsets and sizes in bytes of shared memory, and what they stand for.
struct GradientGeometry {
  int chunk, chunks;                      // channels at a time
  int columns;                            // of results in a group
  int stages, stage;                      // tiles of the other side, bytes of one
  int first;                              // the first stage, after tiles of the own side if these stay
  int own, second;                        // from one matrix of a side to the other: of the own, of the other one
  int own_at, columns_at, statistics_at;  // in a stage: own side, channels of a group, statistics
  int group;                              // from the group of one matrix to that of the other
  int shared;
};

struct GradientArguments {
  Table table;
  Dtype dtype;
  Layout layout;                     // of queries, keys, values and gradients
  float scale, exponent_scale;       // of scores: as it is, and to base 2
  int own[2], other[2], results[2];  // in the table: views
  int outer, lists;                  // outputs of a query; numbers of the other side: by output, or by source
  int statistics;                    // where those of an output begin
  const Statistics* all_statistics;
  int channels[2];  // of a head: of queries and keys, of gradients and values
  uint32_t batch, heads, groups, steps, works;
  GradientGeometry geometry;
};

// dq of all queries; dk and dv of all sources: `slots` of them, the longest of which has so many tokens.
void start_query_gradients(const GradientArguments& args, bool tf32, int64_t slots, int64_t longest, Stream stream);
void start_source_gradients(const GradientArguments& args, bool tf32, int64_t slots, int64_t longest, Stream stream);

}  // namespace xattn::cuda
