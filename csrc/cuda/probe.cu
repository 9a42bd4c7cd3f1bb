// Proof that the CUDA path works from compiler to card: one thread writes the architecture its code
// was compiled for, and the host reads it back.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/probe.h"

namespace xattn::cuda {
namespace {

__global__ void write_architecture(int* architecture) {
#ifdef __CUDA_ARCH__
  *architecture = __CUDA_ARCH__;
#endif
}

void check(cudaError_t status, const char* call) {
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

// One int of device memory, freed on every way out.
class DeviceInt {
 public:
  DeviceInt() { check(cudaMalloc(&pointer_, sizeof(int)), "cudaMalloc"); }
  ~DeviceInt() { cudaFree(pointer_); }
  DeviceInt(const DeviceInt&) = delete;
  DeviceInt& operator=(const DeviceInt&) = delete;
  int* get() const { return pointer_; }

 private:
  int* pointer_ = nullptr;
};

}  // namespace

int probe(int device) {
  const DeviceGuard guard(device);
  const DeviceInt architecture;
  write_architecture<<<1, 1>>>(architecture.get());
  check(cudaGetLastError(), "launch of the probe kernel");
  int result = 0;
  check(cudaMemcpy(&result, architecture.get(), sizeof(int), cudaMemcpyDeviceToHost), "cudaMemcpy");
  return result;
}

}  // namespace xattn::cuda
