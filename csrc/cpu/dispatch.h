// Which build of the kernels runs: the best one this machine can execute, or the one asked for.
#pragma once

#include <string>
#include <vector>

#include "kernels/table.h"

namespace xattn {

// Best first.
std::vector<std::string> compiled_instruction_sets();
std::vector<std::string> available_instruction_sets();
std::string instruction_set();
// Throws std::invalid_argument when `name` is not available.
void set_instruction_set(const std::string& name);
const Kernels& kernels();

}  // namespace xattn
