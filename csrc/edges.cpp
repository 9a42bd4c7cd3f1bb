#include "edges.h"

#include <algorithm>
#include <numeric>

namespace xattn {
namespace {

template <class T>
Span<const T> span(const std::vector<T>& values) {
  return {values.data(), static_cast<int64_t>(values.size())};
}

// Where each slot's edges begin, after sorting by that slot.
std::vector<int64_t> begins(const std::vector<Edge>& edges, int64_t Edge::* side, size_t slots) {
  std::vector<int64_t> begin(slots + 1, 0);
  for (const Edge& edge : edges) ++begin[static_cast<size_t>(edge.*side) + 1];
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  return begin;
}

std::vector<int64_t> order(const std::vector<Edge>& edges, int64_t Edge::* side) {
  std::vector<int64_t> numbers(edges.size());
  std::iota(numbers.begin(), numbers.end(), 0);
  std::stable_sort(numbers.begin(), numbers.end(), [&](int64_t a, int64_t b) {
    return edges[static_cast<size_t>(a)].*side < edges[static_cast<size_t>(b)].*side;
  });
  return numbers;
}

}  // namespace

EdgeIndex::EdgeIndex(const std::vector<int64_t>& flat, size_t fields, size_t queries, size_t sources, size_t outputs) {
  for (size_t i = 0; i + fields <= flat.size(); i += fields)
    edges_.push_back({flat[i], flat[i + 1], flat[i + 2], fields == 4 ? flat[i + 3] : 0});
  sort(queries, sources, outputs);
}

EdgeIndex::EdgeIndex(const EdgeList& edges, int64_t first, int64_t last)
    : edges_(edges.all.data + edges.output_begin[first], edges.all.data + edges.output_begin[last]) {
  sort(static_cast<size_t>(edges.query_begin.size - 1), static_cast<size_t>(edges.source_begin.size - 1),
       static_cast<size_t>(edges.output_begin.size - 1));
}

EdgeIndex::~EdgeIndex() = default;

void EdgeIndex::sort(size_t queries, size_t sources, size_t outputs) {
  std::stable_sort(edges_.begin(), edges_.end(), [](const Edge& a, const Edge& b) { return a.output < b.output; });
  output_begin_ = begins(edges_, &Edge::output, outputs);
  query_begin_ = begins(edges_, &Edge::query, queries);
  source_begin_ = begins(edges_, &Edge::source, sources);
  by_query_ = order(edges_, &Edge::query);
  by_source_ = order(edges_, &Edge::source);
}

EdgeList EdgeIndex::list() const {
  return {span(edges_),       span(output_begin_), span(by_query_),
          span(query_begin_), span(by_source_),    span(source_begin_)};
}

GroupIndex::GroupIndex(const std::vector<int64_t>& group, size_t groups)
    : group_(group), members_(group.size()), begin_(groups + 1, 0) {
  for (int64_t i : group) ++begin_[static_cast<size_t>(i) + 1];
  std::partial_sum(begin_.begin(), begin_.end(), begin_.begin());
  std::iota(members_.begin(), members_.end(), 0);
  std::stable_sort(members_.begin(), members_.end(),
                   [&](int64_t a, int64_t b) { return group[static_cast<size_t>(a)] < group[static_cast<size_t>(b)]; });
}

GroupIndex::~GroupIndex() = default;

Groups GroupIndex::groups() const { return {span(group_), span(members_), span(begin_)}; }

}  // namespace xattn
