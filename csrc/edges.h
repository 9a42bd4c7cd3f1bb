// Edges as Python gives them to edges as kernels walk them.
#pragma once

#include <cstddef>
#include <vector>

#include "problem.h"

namespace xattn {

class EdgeIndex {
 public:
  // Flat edges of `fields` integers each: query, source, output and, with four, weight.
  EdgeIndex(const std::vector<int64_t>& flat, size_t fields, size_t queries, size_t sources, size_t outputs);
  // The edges of outputs [first, last) of another index; slots keep their numbers.
  EdgeIndex(const EdgeList& edges, int64_t first, int64_t last);
  ~EdgeIndex();  // here, as kernels must not compile library code of their own
  EdgeList list() const;

 private:
  void sort(size_t queries, size_t sources, size_t outputs);
  std::vector<Edge> edges_;
  std::vector<int64_t> output_begin_, by_query_, query_begin_, by_source_, source_begin_;
};

// Members in order of their groups.
class GroupIndex {
 public:
  GroupIndex(const std::vector<int64_t>& group, size_t groups);
  ~GroupIndex();
  Groups groups() const;

 private:
  std::vector<int64_t> group_, members_, begin_;
};

}  // namespace xattn
