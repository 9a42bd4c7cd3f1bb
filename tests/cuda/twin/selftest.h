#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace xattn::cuda {

// Runs a kernel of selftest.cu.
void selftest(const std::string& name, const void* a, const void* b, void* d, int64_t number, int64_t works,
              int threads, size_t shared);

}  // namespace xattn::cuda
