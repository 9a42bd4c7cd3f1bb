// What the host asks of CUDA: facts about a device, and launches that check for errors.
//
// Under XATTN_TWIN the same names come from twin.h.
#pragma once

#include "device.h"

#if !defined(XATTN_TWIN)
#include <stdexcept>
#include <string>

namespace xattn::cuda {

using Stream = cudaStream_t;

inline void check(cudaError_t status, const char* call) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
  }
}

// Makes a device current and restores the caller's one, whatever happens in between.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

struct Limits {
  int processors;    // multiprocessors
  int shared_bytes;  // that a block can have
  int capability;    // 90 for compute capability 9.0
};

// Of the current device.
Limits limits();

// Blocks of `threads` and `shared` bytes of a kernel that the current device can hold at a time. Raises
// the kernel's limit of shared memory where needed. Throws if not a single one fits.
int resident_blocks(const void* kernel, const char* name, int threads, size_t shared);

void start(const void* kernel, const char* name, int blocks, int threads, size_t shared, Stream stream, void* argument);

// Runs a kernel on `works` pieces of work, each block on every block_count()th of them.
template <class Argument>
void launch(void (*kernel)(Argument), const char* name, int64_t works, int threads, size_t shared, Stream stream,
            Argument argument) {
  static_assert(sizeof(Argument) <= 4096, "parameters of a kernel");
  if (works <= 0) return;
  const void* function = reinterpret_cast<const void*>(kernel);
  const int64_t most = resident_blocks(function, name, threads, shared);
  start(function, name, static_cast<int>(works < most ? works : most), threads, shared, stream, &argument);
}

}  // namespace xattn::cuda
#endif
