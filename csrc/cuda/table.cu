#include <algorithm>
#include <cstring>

#include "table.h"

namespace xattn::cuda {
namespace {

constexpr int kWriteThreads = 128;

struct WriteArguments {
  int64_t* to;
  int count;
  int64_t numbers[kNear];
};

XATTN_KERNEL(kWriteThreads, 1) write_kernel(XATTN_PARAMETER WriteArguments args) {
  for (int i = thread_index(); i < args.count; i += thread_count()) args.to[i] = args.numbers[i];
}

}  // namespace

int TableBuilder::add(Span<const View> views) {
  static_assert(sizeof(View) == 5 * sizeof(int64_t), "a View is five integers");
  const int begin = static_cast<int>(numbers_.size());
  const int64_t* values = reinterpret_cast<const int64_t*>(views.data);
  numbers_.insert(numbers_.end(), values, values + 5 * views.size);
  return begin;
}

int TableBuilder::add(const std::vector<int64_t>& numbers) {
  const int begin = static_cast<int>(numbers_.size());
  numbers_.insert(numbers_.end(), numbers.begin(), numbers.end());
  return begin;
}

void TableBuilder::set(int first, int64_t slot, const View& view) {
  std::memcpy(numbers_.data() + first + 5 * slot, &view, sizeof(view));
}

int TableBuilder::add_lists(const std::vector<std::vector<int64_t>>& lists) {
  const int begin = static_cast<int>(numbers_.size());
  int64_t next = begin + static_cast<int64_t>(lists.size()) + 1;
  for (const auto& list : lists) {
    numbers_.push_back(next);
    next += static_cast<int64_t>(list.size());
  }
  numbers_.push_back(next);
  for (const auto& list : lists) add(list);
  return begin;
}

void TableBuilder::reserve(Scratch& scratch) {
  if (numbers_.size() > kNear) offset_ = scratch.reserve<int64_t>(static_cast<int64_t>(numbers_.size()));
}

Table TableBuilder::finish(const Scratch& scratch, Stream stream) const {
  Table table{};
  if (numbers_.size() <= kNear) {
    std::copy(numbers_.begin(), numbers_.end(), table.near);
    return table;
  }
  int64_t* memory = scratch.at<int64_t>(offset_);
  for (size_t i = 0; i < numbers_.size(); i += kNear) {
    WriteArguments args{memory + i, static_cast<int>(std::min<size_t>(kNear, numbers_.size() - i)), {}};
    std::memcpy(args.numbers, numbers_.data() + i, sizeof(int64_t) * static_cast<size_t>(args.count));
    launch(write_kernel, "write_table", 1, kWriteThreads, 0, stream, args);
  }
  table.far = memory;
  return table;
}

}  // namespace xattn::cuda
