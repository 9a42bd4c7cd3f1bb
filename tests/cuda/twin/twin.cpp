// The scheduler: runs the threads of a block by turns, and lets none of them pass a barrier or a collective
// before all are there.
#include "twin.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "control.h"
#include "fiber.h"
#include "races.h"
#include "values.h"
#include "wait.h"

extern "C" {
__attribute__((weak)) void* __asan_region_is_poisoned(void* begin, size_t size);
}

namespace xattn::cuda {
namespace twin {

Thread* thread = nullptr;
Block block;

namespace {

constexpr int kMostThreads = 1024;

struct Copy {
  char* shared;
  const char* global;
  int size, bytes;
  int group;
  bool landed;
  Site site;
};

struct Worker : Thread {
  Fiber fiber;
  Site site{};          // where it waits
  Operands operands{};  // of a collective
  std::vector<Copy> copies;
  int groups = 0;  // committed
  bool started = false, returned = false;
  const char* parked = nullptr;  // by what
};

// Of its lanes, as bits.
struct Warp {
  uint32_t runnable, met, waiting, returned;
  Collective kind;
  Site site;
  int number;
};

struct Scheduler {
  std::vector<std::unique_ptr<Worker>> workers;
  Fiber host;
  Warp warps[kMostThreads / kWarp];
  uint32_t runnable = 0;  // warps that have a runnable lane
  int waiting = 0, returned = 0;
  Site barrier{};
  uint64_t random = 1;
  uint64_t change = 0;  // another warp goes next where these bits of a random number are zero
  uint64_t launches = 0;
  const char* name = "";
  const void* kernel = nullptr;
  const void* argument = nullptr;
  Call call = nullptr;
  size_t shared_bytes = 0;
  std::string error;
  uint64_t turns = 0;                 // blocks that have run
  uint64_t meetings = 0;              // of all threads of this one
  std::string (*at_end)() = nullptr;  // of this one
};

Scheduler scheduler;
Settings settings;
Record record;
std::mutex launching;

uint64_t draw() {
  uint64_t x = scheduler.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return scheduler.random = x;
}

void seed(uint64_t value) {
  value += 0x9E3779B97F4A7C15u * (scheduler.launches + 1);
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
  scheduler.random = (value ^ (value >> 31)) | 1;
  for (int i = 0; i < 8; i++) draw();
}

Worker& self() { return *static_cast<Worker*>(thread); }

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::kSync:
      return "sync_warp";
    case Collective::kShuffleXor:
      return "shuffle_xor";
    case Collective::kShuffle:
      return "shuffle";
    case Collective::kAny:
      return "any";
    case Collective::kLoad:
      return "load_matrices";
    case Collective::kLoadTransposed:
      return "load_matrices_transposed";
    case Collective::kBFloat16:
      return "multiply_bfloat16";
    case Collective::kTf32:
      return "multiply_tf32";
  }
  return "?";
}

std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

std::string where(const Worker& worker) {
  const Warp& warp = scheduler.warps[worker.warp];
  if (worker.returned) return "returned";
  if (warp.met >> worker.lane & 1) return std::string(name_of(warp.kind)) + " at " + text(worker.site);
  if (warp.waiting >> worker.lane & 1) return "sync_threads at " + text(worker.site);
  if (worker.parked) return std::string(worker.parked) + " at " + text(worker.site);
  return "runs";
}

// What every thread of the block does, threads of the same in one line.
std::string everybody() {
  std::string lines;
  const int threads = block.threads;
  for (int first = 0, last; first < threads; first = last) {
    const std::string state = where(*scheduler.workers[first]);
    for (last = first + 1; last < threads && where(*scheduler.workers[last]) == state;) last++;
    lines += "\n  threads " + std::to_string(first) + " to " + std::to_string(last - 1) + ": " + state;
  }
  return lines;
}

}  // namespace

// What waits is left where it is.
[[noreturn]] void fail(const std::string& what) {
  scheduler.error = std::string(scheduler.name) + ": block " + std::to_string(block.index) + ", thread " +
                    std::to_string(thread->index) + ": " + what + everybody();
  switch_fiber(self().fiber, scheduler.host);
  std::abort();
}

namespace {

void set_runnable(int warp, uint32_t lanes) {
  scheduler.warps[warp].runnable = lanes;
  if (lanes) {
    scheduler.runnable |= 1u << warp;
  } else {
    scheduler.runnable &= ~(1u << warp);
  }
}

// A random one of the bits of a mask that is not zero.
int pick(uint32_t mask, uint64_t random) {
  const unsigned turn = random & 31;
  const uint32_t turned = mask >> turn | mask << (-turn & 31);
  return static_cast<int>((__builtin_ctz(turned) + turn) & 31);
}

Worker* next() {
  if (!scheduler.runnable) return nullptr;
  const uint64_t random = draw();
  int warp = thread ? thread->warp : 0;
  if (!(scheduler.runnable >> warp & 1) || !(random >> 16 & scheduler.change)) {
    warp = pick(scheduler.runnable, random >> 8);
  }
  return scheduler.workers[warp * kWarp + pick(scheduler.warps[warp].runnable, random)].get();
}

// Lets others run until this thread is chosen again, or for ever.
void give_way() {
  Worker& me = self();
  Worker* other = next();
  if (other == &me) return;
  thread = other;
  switch_fiber(me.fiber, other ? other->fiber : scheduler.host);
}

void block_lane(Worker& me, Warp& warp) {
  set_runnable(me.warp, warp.runnable & ~(1u << me.lane));
  if (!scheduler.runnable) fail("nobody can go on");
  give_way();
}

void note(const char* kind, Site site) {
  for (Place& place : record.places) {
    if (place.kind == kind && same({place.file, place.line}, site)) {
      place.count++;
      return;
    }
  }
  record.places.push_back({kind, site.file, site.line, 1});
}

bool dropped(const char* kind, Site site) {
  return settings.drop_kind == kind && settings.drop_line == site.line &&
         std::string(site.file).size() >= settings.drop_file.size() &&
         std::string(site.file).compare(std::string(site.file).size() - settings.drop_file.size(), std::string::npos,
                                        settings.drop_file) == 0;
}

bool in_shared(const void* pointer, size_t bytes) {
  const char* first = static_cast<const char*>(pointer);
  return first >= block.shared && first + bytes <= block.shared + scheduler.shared_bytes;
}

// What a GPU would refuse of an address in shared memory.
std::string fault_of(const void* pointer, int size) {
  if (!in_shared(pointer, static_cast<size_t>(size))) {
    return std::to_string(size) + " bytes at offset " +
           std::to_string(static_cast<const char*>(pointer) - block.shared) +
           " are not in the block's shared memory of " + std::to_string(scheduler.shared_bytes);
  }
  if (reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(size) != 0) {
    return "offset " + std::to_string(static_cast<const char*>(pointer) - block.shared) +
           " in shared memory is not a multiple of " + std::to_string(size);
  }
  return "";
}

void compute(Collective kind, Operands* const* lanes) {
  Launch& launch = record.launches.back();
  switch (kind) {
    case Collective::kSync:
      return;
    case Collective::kShuffleXor:
    case Collective::kShuffle:
    case Collective::kAny:
      launch.shuffles++;
      return exchange_values(kind, lanes);
    case Collective::kLoad:
    case Collective::kLoadTransposed:
      launch.loads++;
      launch.conflicts += conflicts(lanes, block.shared);
      return load(lanes, kind == Collective::kLoadTransposed);
    case Collective::kBFloat16:
    case Collective::kTf32:
      launch.products++;
      return multiply(lanes, kind == Collective::kBFloat16);
  }
}

void rendezvous(Collective kind, Site site, const Operands& operands) {
  Worker& me = self();
  Warp& warp = scheduler.warps[me.warp];
  if (kind == Collective::kSync) {
    if (me.lane == 0) note("warp", site);
    if (dropped("warp", site)) return;
  }
  const auto here = [&] { return std::string(name_of(kind)) + " at " + text(site); };
  if (warp.returned || warp.waiting) fail(here() + ", where not all lanes of the warp arrive");
  if (warp.met && (warp.kind != kind || !same(warp.site, site))) {
    fail(here() + ", others of the warp at " + name_of(warp.kind) + " at " + text(warp.site));
  }
  if (kind == Collective::kShuffleXor) {
    if (operands.number < 0 || operands.number >= kWarp) fail(here() + ": mask " + std::to_string(operands.number));
    if (warp.met && warp.number != operands.number) {
      fail(here() + ": mask " + std::to_string(operands.number) + ", others of the warp " +
           std::to_string(warp.number));
    }
  }
  if (kind == Collective::kShuffle && (operands.number < 0 || operands.number >= kWarp)) {
    fail(here() + ": from lane " + std::to_string(operands.number));
  }
  if (kind == Collective::kLoad || kind == Collective::kLoadTransposed) {
    const std::string fault = fault_of(operands.a, 16);
    if (!fault.empty()) fail(here() + ": " + fault);
    touch(operands.a, 16, false, site);
  }
  me.operands = operands;
  me.site = site;
  warp.kind = kind;
  warp.site = site;
  warp.number = operands.number;
  warp.met |= 1u << me.lane;
  if (warp.met != 0xFFFFFFFFu) return block_lane(me, warp);
  if (kind == Collective::kSync) pass_warp(me.warp);
  Operands* lanes[kWarp];
  for (int i = 0; i < kWarp; i++) lanes[i] = &scheduler.workers[me.warp * kWarp + i]->operands;
  compute(kind, lanes);
  warp.met = 0;
  set_runnable(me.warp, 0xFFFFFFFFu);
}

void land(Copy& copy) {
  if (copy.landed) return;
  std::memset(copy.shared, 0, static_cast<size_t>(copy.size));
  std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
  copy.landed = true;
}

// What memory holds before anybody has written it: NaN in every type.
constexpr uint32_t kGarbage[] = {0x7FA57FA5u, 0xFFA5FFA5u, 0x7FC37FC3u, 0xFFE1FFE1u};

void spoil(char* memory, size_t bytes) {
  const uint32_t pattern = kGarbage[draw() >> 20 & 3];
  size_t i = 0;
  for (; i + 4 <= bytes; i += 4) std::memcpy(memory + i, &pattern, 4);
  std::memcpy(memory + i, &pattern, bytes - i);
}

void finish() {
  Worker& me = self();
  Warp& warp = scheduler.warps[me.warp];
  me.returned = true;
  if (!me.copies.empty()) fail("returned without wait_copies for copy_async at " + text(me.copies.front().site));
  if (warp.met) fail("returned, others of the warp at " + std::string(name_of(warp.kind)) + " at " + text(warp.site));
  if (scheduler.waiting) fail("returned, others of the block at sync_threads at " + text(scheduler.barrier));
  warp.returned |= 1u << me.lane;
  scheduler.returned++;
  set_runnable(me.warp, warp.runnable & ~(1u << me.lane));
  if (scheduler.returned < block.threads) {
    if (!scheduler.runnable) fail("nobody can go on");
  } else if (scheduler.at_end) {
    const std::string fault = scheduler.at_end();
    if (!fault.empty()) fail(fault);
  }
  give_way();
  std::abort();
}

void enter() {
  entered(scheduler.host);
  self().started = true;
  scheduler.call(scheduler.kernel, scheduler.argument);
  finish();
}

void run_block(int index) {
  block.index = index;
  scheduler.turns++;
  scheduler.meetings = 0;
  scheduler.at_end = nullptr;
  pass_barrier();
  spoil(block.shared, scheduler.shared_bytes);
  scheduler.waiting = scheduler.returned = 0;
  scheduler.runnable = 0;
  constexpr uint64_t kChanges[] = {~0ull, 0xFF, 0x1F, 0x3};
  scheduler.change = kChanges[draw() >> 20 & 3];
  for (int i = 0; i < block.threads / kWarp; i++) {
    scheduler.warps[i] = Warp{};
    set_runnable(i, 0xFFFFFFFFu);
  }
  for (int i = 0; i < block.threads; i++) {
    Worker& worker = *scheduler.workers[i];
    prepare(worker.fiber, &enter);
    worker.copies.clear();
    worker.groups = 0;
    worker.started = worker.returned = false;
    worker.parked = nullptr;
  }
  thread = nullptr;
  thread = next();
  switch_fiber(scheduler.host, self().fiber);
  thread = nullptr;
  if (!scheduler.error.empty()) {
    for (int i = 0; i < block.threads; i++) abandon(scheduler.workers[i]->fiber);
  }
}

void make_workers(int count) {
  const int there = static_cast<int>(scheduler.workers.size());
  std::vector<Fiber*> fibers;
  for (int i = there; i < count; i++) {
    scheduler.workers.push_back(std::make_unique<Worker>());
    Worker& worker = *scheduler.workers.back();
    worker.index = i;
    worker.lane = i % kWarp;
    worker.warp = i / kWarp;
    fibers.push_back(&worker.fiber);
  }
  if (!fibers.empty()) make_stacks(fibers.data(), static_cast<int>(fibers.size()));
}

}  // namespace

void park(Site site, const char* what) {
  Worker& me = self();
  me.site = site;
  me.parked = what;
  block_lane(me, scheduler.warps[me.warp]);
  me.parked = nullptr;
}

void wake(int index) {
  const Worker& other = *scheduler.workers[index];
  set_runnable(other.warp, scheduler.warps[other.warp].runnable | 1u << other.lane);
}

bool passed_over(const char* kind, Site site) {
  note(kind, site);
  return dropped(kind, site);
}

uint64_t random_bits() { return draw() >> 20; }

uint64_t turn() { return scheduler.turns; }

uint64_t meetings() { return scheduler.meetings; }

size_t shared_bytes() { return scheduler.shared_bytes; }

void at_end(std::string (*check)()) { scheduler.at_end = check; }

void meet(Collective kind, Site site, void* result, const void* a, const void* b) {
  rendezvous(kind, site, {result, a, b, 0, 0});
}

uint64_t exchange(Collective kind, Site site, uint64_t value, int number) {
  rendezvous(kind, site, {nullptr, nullptr, nullptr, value, number});
  return self().operands.value;
}

void barrier(Site site) {
  Worker& me = self();
  Warp& warp = scheduler.warps[me.warp];
  if (me.index == 0) note("barrier", site);
  if (dropped("barrier", site)) return;
  const auto here = [&] { return "sync_threads at " + text(site); };
  if (warp.met) fail(here() + ", others of the warp at " + name_of(warp.kind) + " at " + text(warp.site));
  if (scheduler.returned) fail(here() + ", where not all threads of the block arrive");
  if (scheduler.waiting && !same(scheduler.barrier, site)) {
    fail(here() + ", others of the block at sync_threads at " + text(scheduler.barrier));
  }
  me.site = scheduler.barrier = site;
  warp.waiting |= 1u << me.lane;
  if (++scheduler.waiting < block.threads) return block_lane(me, warp);
  scheduler.waiting = 0;
  scheduler.meetings++;
  pass_barrier();
  for (int i = 0; i < block.threads / kWarp; i++) {
    scheduler.warps[i].waiting = 0;
    set_runnable(i, 0xFFFFFFFFu);
  }
  // The last to arrive is not always the first to go on.
  if (draw() >> 20 & 1) give_way();
}

void copy(Site site, void* shared, const void* global, int size, int bytes) {
  Worker& me = self();
  const auto here = [&] { return "copy_async at " + text(site) + ": "; };
  const std::string fault = fault_of(shared, size);
  if (!fault.empty()) fail(here() + "to: " + fault);
  if (bytes < 0 || bytes > size) fail(here() + "of " + std::to_string(bytes) + " bytes");
  if (bytes > 0) {
    if (reinterpret_cast<uintptr_t>(global) % static_cast<uintptr_t>(size) != 0) {
      fail(here() + "from an address that is not a multiple of " + std::to_string(size));
    }
    if (in_shared(global, 1)) fail(here() + "from shared memory");
    const void* bad = __asan_region_is_poisoned
                          ? __asan_region_is_poisoned(const_cast<void*>(global), static_cast<size_t>(bytes))
                          : nullptr;
    if (bad) {
      fail(here() + "of " + std::to_string(bytes) + " bytes, of which byte " +
           std::to_string(static_cast<const char*>(bad) - static_cast<const char*>(global)) + " is out of bounds");
    }
  }
  record.launches.back().copied_bytes += bytes;
  touch(shared, static_cast<size_t>(size), true, site);
  me.copies.push_back(
      {static_cast<char*>(shared), static_cast<const char*>(global), size, bytes, me.groups, false, site});
  if (draw() >> 20 & 1) {
    land(me.copies.back());
  } else {
    spoil(static_cast<char*>(shared), static_cast<size_t>(size));
  }
}

void commit() { self().groups++; }

void wait(Site site, int pending) {
  Worker& me = self();
  if (me.index == 0) note("wait", site);
  if (dropped("wait", site)) return;
  auto& copies = me.copies;
  size_t ready = 0;
  for (; ready < copies.size() && copies[ready].group < me.groups - pending; ready++) {
    touch(copies[ready].shared, static_cast<size_t>(copies[ready].size), true, copies[ready].site);
    land(copies[ready]);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(ready));
}

void start(const void* kernel, Call call, const char* name, int blocks, int threads, size_t shared,
           const void* argument) {
  const std::lock_guard<std::mutex> lock(launching);
  make_workers(threads);
  seed(settings.seed);
  scheduler.launches++;
  scheduler.name = name;
  scheduler.kernel = kernel;
  scheduler.call = call;
  scheduler.argument = argument;
  scheduler.shared_bytes = shared;
  scheduler.error.clear();
  scheduler.host = Fiber{};
  record.launches.push_back({name, blocks, threads, static_cast<int64_t>(shared), 0, 0, 0, 0, 0});

  // Of exactly this size, so that AddressSanitizer sees the first byte beyond it.
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, shared) != 0) throw std::runtime_error(std::string(name) + ": no memory");
  const std::unique_ptr<void, void (*)(void*)> owner(memory, &std::free);
  block = {threads, 0, blocks, static_cast<char*>(memory)};

  std::vector<int> order(static_cast<size_t>(blocks));
  for (int i = 0; i < blocks; i++) order[static_cast<size_t>(i)] = i;
  for (int i = blocks - 1; i > 0; i--) {
    std::swap(order[static_cast<size_t>(i)], order[static_cast<size_t>((draw() >> 20) % static_cast<uint64_t>(i + 1))]);
  }
  watch(block.shared, shared);
  for (const int index : order) {
    run_block(index);
    if (!scheduler.error.empty()) break;
  }
  watch(nullptr, 0);
  if (!scheduler.error.empty()) throw std::runtime_error(with_places(scheduler.error));
}

void configure(const Settings& fresh) {
  const std::lock_guard<std::mutex> lock(launching);
  settings = fresh;
  record = {};
  scheduler.launches = 0;
}

Settings configuration() { return settings; }

Record recorded() { return record; }

}  // namespace twin

Limits limits() { return {twin::settings.processors, twin::settings.shared_bytes, twin::settings.capability}; }

int resident_blocks(const void*, const char* name, int threads, size_t shared) {
  const Limits device = limits();
  if (shared > static_cast<size_t>(device.shared_bytes)) {
    throw std::runtime_error(std::string(name) + ": needs " + std::to_string(shared) +
                             " bytes of shared memory, a block of this device has " +
                             std::to_string(device.shared_bytes));
  }
  if (threads < kWarp || threads > twin::kMostThreads || threads % kWarp != 0) {
    throw std::runtime_error(std::string(name) + ": a block of " + std::to_string(threads) + " threads and " +
                             std::to_string(shared) + " bytes of shared memory does not fit this device");
  }
  return device.processors;
}

}  // namespace xattn::cuda
