// What a part of the layer that has waits of its own (sm90_twin.cpp) needs of the scheduler in twin.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "twin.h"

namespace xattn::cuda::twin {

// The current thread waits until somebody calls wake with its index; it may have to wait again.
void park(Site site, const char* what);
void wake(int index);
// Whether twin_drop names this call. Records where it stands.
bool passed_over(const char* kind, Site site);
// Bits drawn by seed.
uint64_t random_bits();
// Of the block that runs: a number of its own, how many times its threads have all met at sync_threads, its bytes of
// shared memory, and what to ask for a fault when all its threads have returned.
uint64_t turn();
uint64_t meetings();
size_t shared_bytes();
void at_end(std::string (*check)());

}  // namespace xattn::cuda::twin
