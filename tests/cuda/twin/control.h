// What tests set before launches, and may ask after them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace xattn::cuda::twin {

struct Settings {
  uint64_t seed = 0;
  int processors = 4;
  int shared_bytes = 232448;
  int capability = 90;
  // The call that does nothing: "barrier", "warp" or "wait", by the end of its file's name and its line.
  std::string drop_kind, drop_file;
  int drop_line = 0;
};

// Where threads waited, counted for the first thread of blocks, or of warps.
struct Place {
  std::string kind;
  const char* file;
  int line;
  int64_t count;
};
// `conflicts` are the times more that load_matrices would need, as rows of a matrix share banks.
struct Launch {
  std::string name;
  int blocks, threads;
  int64_t shared;
  int64_t products, loads, conflicts, shuffles, copied_bytes;
};
struct Record {
  std::vector<Place> places;
  std::vector<Launch> launches;
};

// The record starts anew.
void configure(const Settings& settings);
Settings configuration();
Record recorded();

}  // namespace xattn::cuda::twin
