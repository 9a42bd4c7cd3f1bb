#include <map>
#include <mutex>
#include <tuple>

#include "launch.h"

namespace xattn::cuda {

namespace {

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

std::mutex mutex;

}  // namespace

Limits limits() {
  static std::map<int, Limits> known;
  const int device = current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const Limits fresh{
      attribute(cudaDevAttrMultiProcessorCount, device), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
      attribute(cudaDevAttrComputeCapabilityMajor, device) * 10 + attribute(cudaDevAttrComputeCapabilityMinor, device)};
  return known.emplace(device, fresh).first->second;
}

int resident_blocks(const void* kernel, const char* name, int threads, size_t shared) {
  static std::map<std::tuple<int, const void*, int, size_t>, int> known;
  const Limits device = limits();
  const auto key = std::make_tuple(current_device(), kernel, threads, shared);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (shared > static_cast<size_t>(device.shared_bytes)) {
    throw std::runtime_error(std::string(name) + ": needs " + std::to_string(shared) +
                             " bytes of shared memory, a block of this device has " +
                             std::to_string(device.shared_bytes));
  }
  // Never lowered: a kernel may be launched with less shared memory than before, and again with more.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes), name);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared), name);
  if (blocks < 1) {
    throw std::runtime_error(std::string(name) + ": a block of " + std::to_string(threads) + " threads and " +
                             std::to_string(shared) + " bytes of shared memory does not fit this device");
  }
  return known.emplace(key, blocks * device.processors).first->second;
}

void start(const void* kernel, const char* name, int blocks, int threads, size_t shared, Stream stream,
           void* argument) {
  void* arguments[] = {argument};
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), arguments,
                         shared, stream),
        name);
}

}  // namespace xattn::cuda
