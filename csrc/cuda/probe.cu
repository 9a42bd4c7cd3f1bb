// Proof that the CUDA path works from compiler to card: one thread writes the architecture its code
// was compiled for, and the host reads it back.
#include "cuda/launch.h"
#include "cuda/probe.h"

namespace xattn::cuda {
namespace {

__global__ void write_architecture(int* architecture) {
#ifdef __CUDA_ARCH__
  *architecture = __CUDA_ARCH__;
#endif
}

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
