// Two accesses of shared memory by different threads, one of them a write, with no barrier between: a race,
// whatever the order in which the threads came this time.
//
// Kernels compiled with -fsanitize=thread call one of the functions in races.cpp before every access; in
// other builds nobody does. What orders accesses is sync_threads, and sync_warp within a warp; shuffles,
// votes and products order nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "twin.h"

namespace xattn::cuda::twin {

// Shared memory of the block that runs; no memory: nothing is watched.
void watch(char* memory, size_t bytes);
// The block or, at a barrier, all its threads begin anew; the lanes of a warp do.
void pass_barrier();
void pass_warp(int warp);
// Accesses of the current thread by load_matrices and copy_async.
void touch(const void* memory, size_t bytes, bool write, Site site);
// `text` with addresses in code replaced by places in the source.
std::string with_places(const std::string& text);

// Ends the launch with an error.
[[noreturn]] void fail(const std::string& what);

}  // namespace xattn::cuda::twin
