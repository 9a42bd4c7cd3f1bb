// Sums over tokens in two stages: partial sums of chunks of tokens, one block each, then sums of these in a
// fixed order. A partial sum is a (rows + 1) x channels matrix of float: S, then Z in the last row.
#pragma once

#include <vector>

#include "table.h"

namespace xattn::cuda {

// How the tokens of slots are divided. Partial sum (first[slot] + i) * batch + b is that of the i-th chunk
// of a slot in batch b; a slot without tokens has none.
struct Chunks {
  int64_t batch, channels, rows;
  int64_t size;      // tokens of a chunk
  int64_t per_slot;  // chunks of the longest slot
  int64_t slots;
  int64_t total;   // chunks of all slots
  int table;       // where the numbers `first` begin, one more than slots
  int64_t offset;  // of the partial sums in scratch memory
  int64_t elements() const { return (rows + 1) * channels; }
};

// Tokens of a chunk: a multiple of `tile`, few enough to keep a device's processors busy with `parallel`
// works beside.
int64_t chunk_tokens(int64_t longest, int64_t parallel, int64_t tile, int processors);

Chunks make_chunks(const std::vector<int64_t>& tokens, int64_t batch, int64_t rows, int64_t channels, int64_t size,
                   TableBuilder& table, Scratch& scratch);

// For list l of slots: s[l], z[l] = start + the partial sums of all members. s is (lists, batch, rows,
// channels), z (lists, batch, channels); `start` is of lists, or with by_member of slots; null: zero.
struct StateSums {
  int lists;  // in the table
  int64_t count;
  const float *start_s, *start_z;
  bool by_member;
  float *s, *z;
};
void sum_states(const Table& table, const Chunks& chunks, const float* partial, const StateSums& sums, Stream stream);

}  // namespace xattn::cuda
