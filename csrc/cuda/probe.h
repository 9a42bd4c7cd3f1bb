#pragma once

namespace xattn::cuda {

// Runs one tiny kernel on `device` and returns the architecture its code was compiled for, times
// ten (900 for sm_90). Throws std::runtime_error with CUDA's message when it cannot run there.
int probe(int device);

}  // namespace xattn::cuda
