// Lists of slots and edges as kernels read them: numbers in a kernel's own parameter, which a CUDA graph
// keeps, and where they are too many for that, in device memory written by kernels that have them as
// parameters.
#pragma once

#include <functional>
#include <vector>

#include "../problem.h"
#include "launch.h"

namespace xattn::cuda {

constexpr int kNear = 440;  // leaves 568 bytes of a parameter for the rest

struct Table {
  const int64_t* far;
  int64_t near[kNear];
  XATTN_DEVICE int64_t operator[](int64_t i) const { return far != nullptr ? far[i] : near[i]; }
  // Slot `slot` of the views that begin at `first`.
  XATTN_DEVICE View view(int first, int64_t slot) const {
    const int64_t i = first + slot * 5;
    return {reinterpret_cast<char*>((*this)[i]), (*this)[i + 1], (*this)[i + 2], (*this)[i + 3], (*this)[i + 4]};
  }
};

// What a call of an operator gets besides its problem.
struct Call {
  int device;
  Stream stream;
  bool tf32;  // whether float32 may be multiplied as tf32
  // Asked once, for so many bytes of device memory, aligned to 256, that live as long as the call's kernels.
  std::function<char*(int64_t)> scratch;
};

// Parts of the scratch memory: their sizes first, their addresses once there is memory.
class Scratch {
 public:
  // Offset of `count` elements of T.
  template <class T>
  int64_t reserve(int64_t count) {
    const int64_t offset = bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return offset;
  }
  void allocate(const Call& call) { base_ = bytes_ > 0 ? call.scratch(bytes_) : nullptr; }
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

 private:
  int64_t bytes_ = 0;
  char* base_ = nullptr;
};

class TableBuilder {
 public:
  // Where the numbers of these begin in the table.
  int add(Span<const View> views);
  int add(const std::vector<int64_t>& numbers);
  // View `slot` of those that begin at `first`, where scratch memory had to be allocated first.
  void set(int first, int64_t slot, const View& view);
  // Lists one after another: list i is numbers [table[begin + i], table[begin + i + 1]) of the table.
  int add_lists(const std::vector<std::vector<int64_t>>& lists);
  // To be called before scratch memory is allocated.
  void reserve(Scratch& scratch);
  // The table for kernels that `stream` runs from now on.
  Table finish(const Scratch& scratch, Stream stream) const;

 private:
  std::vector<int64_t> numbers_;
  int64_t offset_ = 0;
};

}  // namespace xattn::cuda
