#include "races.h"

#include <dlfcn.h>

#include <cstdio>
#include <memory>
#include <vector>

namespace xattn::cuda::twin {
namespace {

// Where an access stands: a call that named its place, or an address in code.
struct Origin {
  Site site;
  const void* code;
};

// An access. Barriers of the block and of the warp that were passed before it.
struct Access {
  uint32_t epoch = 0, warp_epoch = 0;
  int thread = -1;
  Origin origin{};
};

// Of every two bytes: the last write, and the reads since the last barrier of the block, summarised.
struct Cell {
  Access write, read;
  bool several_lanes = false, several_warps = false;  // that have read
};

constexpr size_t kGrain = 2;

struct Watch {
  const char* memory = nullptr;
  size_t bytes = 0;
  uint32_t epoch = 1;
  uint32_t warp_epochs[32] = {};
  std::vector<Cell> cells;
};

Watch watched;

// Whether the current thread may come after another's access.
bool in_order(const Access& before) {
  if (before.epoch != watched.epoch || before.thread == thread->index) return true;
  return before.thread / kWarp == thread->warp && before.warp_epoch != watched.warp_epochs[thread->warp];
}

std::string text(const Origin& origin) {
  if (origin.site.file) return std::string(origin.site.file) + ":" + std::to_string(origin.site.line);
  char address[32];
  std::snprintf(address, sizeof(address), "{%p}", origin.code);
  return address;
}

[[noreturn]] void report(size_t offset, const char* now, const Origin& origin, const char* then, const Access& other) {
  fail(std::string("race at offset ") + std::to_string(offset) + " of shared memory: " + now + " at " + text(origin) +
       ", " + then + " by thread " + std::to_string(other.thread) + " at " + text(other.origin) +
       ", no barrier between");
}

void access(const void* memory, size_t bytes, bool write, const Origin& origin) {
  const size_t begin = static_cast<size_t>(static_cast<const char*>(memory) - watched.memory);
  if (begin >= watched.bytes || !thread) return;
  const Access mine{watched.epoch, watched.warp_epochs[thread->warp], thread->index, origin};
  for (size_t i = begin / kGrain; i <= (begin + bytes - 1) / kGrain && i < watched.cells.size(); i++) {
    Cell& cell = watched.cells[i];
    if (!in_order(cell.write)) report(i * kGrain, write ? "written" : "read", origin, "written", cell.write);
    Access& read = cell.read;
    const bool fresh = read.epoch != watched.epoch;
    const bool same_warp = !fresh && read.thread / kWarp == thread->warp;
    const bool same_turn = same_warp && read.warp_epoch == mine.warp_epoch;
    if (write) {
      const bool alone = read.thread == thread->index && !(same_turn && cell.several_lanes);
      if (!fresh && (cell.several_warps || !same_warp || (same_turn && !alone))) {
        report(i * kGrain, "written", origin, "read", read);
      }
      cell.write = mine;
    } else {
      cell.several_warps = !fresh && (cell.several_warps || !same_warp);
      cell.several_lanes = same_turn && (cell.several_lanes || read.thread != thread->index);
      read = mine;
    }
  }
}

}  // namespace

void watch(char* memory, size_t bytes) {
  watched.memory = memory;
  watched.bytes = bytes;
  if (watched.cells.size() < (bytes + kGrain - 1) / kGrain) watched.cells.resize((bytes + kGrain - 1) / kGrain);
}

void pass_barrier() { watched.epoch++; }

void pass_warp(int warp) { watched.warp_epochs[warp]++; }

void touch(const void* memory, size_t bytes, bool write, Site site) { access(memory, bytes, write, {site, nullptr}); }

std::string with_places(const std::string& text) {
  std::string result;
  size_t i = 0;
  for (size_t open; (open = text.find("{0x", i)) != std::string::npos;) {
    const size_t close = text.find('}', open);
    const std::string address = text.substr(open + 1, close - open - 1);
    result += text.substr(i, open - i);
    i = close + 1;
    // The instruction before the one that is returned to.
    const char* code = reinterpret_cast<const char*>(std::stoull(address, nullptr, 16)) - 1;
    Dl_info info;
    std::string place = address;
    if (dladdr(code, &info) != 0) {
      char offset[32];
      std::snprintf(offset, sizeof(offset), "%tx", code - static_cast<const char*>(info.dli_fbase));
      const std::string command = std::string("addr2line -i -e '") + info.dli_fname + "' " + offset + " 2>&1";
      const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.c_str(), "r"), &pclose);
      char line[1024];
      place.clear();
      while (pipe && std::fgets(line, sizeof(line), pipe.get())) {
        std::string found(line);
        found.erase(found.find_last_not_of(" \n") + 1);
        place += (place.empty() ? "" : " in ") + found.substr(found.find_last_of('/') + 1);
      }
    }
    result += place;
  }
  return result + text.substr(i);
}

}  // namespace xattn::cuda::twin

#define XATTN_HOOK(name, bytes, write)                                                            \
  extern "C" __attribute__((visibility("hidden"))) void __tsan_##name(void* memory) {             \
    xattn::cuda::twin::access(memory, bytes, write, {{nullptr, 0}, __builtin_return_address(0)}); \
  }
XATTN_HOOK(read1, 1, false)
XATTN_HOOK(read2, 2, false)
XATTN_HOOK(read4, 4, false)
XATTN_HOOK(read8, 8, false)
XATTN_HOOK(read16, 16, false)
XATTN_HOOK(write1, 1, true)
XATTN_HOOK(write2, 2, true)
XATTN_HOOK(write4, 4, true)
XATTN_HOOK(write8, 8, true)
XATTN_HOOK(write16, 16, true)
XATTN_HOOK(unaligned_read2, 2, false)
XATTN_HOOK(unaligned_read4, 4, false)
XATTN_HOOK(unaligned_read8, 8, false)
XATTN_HOOK(unaligned_read16, 16, false)
XATTN_HOOK(unaligned_write2, 2, true)
XATTN_HOOK(unaligned_write4, 4, true)
XATTN_HOOK(unaligned_write8, 8, true)
XATTN_HOOK(unaligned_write16, 16, true)
#undef XATTN_HOOK

extern "C" {
__attribute__((visibility("hidden"))) void __tsan_init() {}
__attribute__((visibility("hidden"))) void __tsan_func_entry(void*) {}
__attribute__((visibility("hidden"))) void __tsan_func_exit() {}
__attribute__((visibility("hidden"))) void __tsan_vptr_update(void**, void*) {}
__attribute__((visibility("hidden"))) void __tsan_vptr_read(void**) {}
__attribute__((visibility("hidden"))) void __tsan_read_range(void* memory, size_t bytes) {
  if (bytes > 0) xattn::cuda::twin::access(memory, bytes, false, {{nullptr, 0}, __builtin_return_address(0)});
}
__attribute__((visibility("hidden"))) void __tsan_write_range(void* memory, size_t bytes) {
  if (bytes > 0) xattn::cuda::twin::access(memory, bytes, true, {{nullptr, 0}, __builtin_return_address(0)});
}
}
