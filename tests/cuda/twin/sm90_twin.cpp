// What sm90_twin.h names, on the scheduler's park and wake.
#include "sm90_twin.h"

#include <algorithm>
#include <map>
#include <memory>
#include <vector>

#include "races.h"
#include "wait.h"

extern "C" {
__attribute__((weak)) void* __asan_region_is_poisoned(void* begin, size_t size);
}

namespace xattn::cuda::twin {
namespace {

constexpr int kGroupThreads = 4 * kWarp, kMostGroups = 8;
constexpr uint32_t kBase = 1024;  // where shared memory begins on a GPU, so that offsets are no addresses
constexpr uint64_t kMark = 0x5A3CB0A7B0A75A3Cu;

struct NamedBarrier {
  int threads = 0;
  std::vector<int> waiting;
};

struct Copy {
  char* shared;
  const char* global;
  int bytes;
  Site site;
};

struct Phases {
  int arrivals = 0, pending = 0;
  int maker = 0;
  uint64_t made = 0;  // after so many meetings
  int64_t bytes = 0;  // expected and not yet landed
  int parity = 0;
  std::vector<int> waiting;
  std::vector<Copy> copies;
};

// A thread's share of a product.
struct Share {
  float* d;
  const uint32_t* a;
  uint32_t a_then[4];
  std::vector<float> start;  // of d; empty where an earlier product that is not done gives it
};

// Warps have 16 rows each, and nothing makes them wait for each other.
struct Product {
  WideOperands operands;
  Site site;
  int arrived[4] = {};
  Share shares[kGroupThreads];
};

struct Group {
  std::vector<std::unique_ptr<Product>> products;
  int issued[kGroupThreads] = {};
  std::vector<int> ends[kGroupThreads];  // of each thread's groups: products issued by then
  bool begun[kGroupThreads] = {};
  size_t done[4] = {};  // by warps
  std::vector<int> waiting;
};

struct State {
  uint64_t turn = 0;
  std::vector<char> seen;  // shared memory as products and bulk copies see it
  std::map<const Mbarrier*, Phases> phases;
  NamedBarrier named[16];
  Group groups[kMostGroups];
};

State state;

// Whether AddressSanitizer, where it is there, lets nobody touch some bytes.
bool out_of_bounds(const void* memory, size_t bytes) {
  return __asan_region_is_poisoned && __asan_region_is_poisoned(const_cast<void*>(memory), bytes);
}

std::string at(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

std::string unfinished() {
  for (const auto& [barrier, phases] : state.phases) {
    if (!phases.copies.empty()) return "copy_bulk at " + at(phases.copies.front().site) + " is never waited for";
  }
  for (const Group& group : state.groups) {
    for (const size_t done : group.done) {
      if (done < group.products.size()) {
        return "multiply_wide at " + at(group.products[done]->site) + " is not waited for by all warps";
      }
    }
  }
  return "";
}

// The state of the block that runs.
State& current() {
  if (state.turn != turn()) {
    state = State{};
    state.turn = turn();
    state.seen.assign(block.shared, block.shared + shared_bytes());
    watch(nullptr, 0);  // knows only barriers of whole blocks and warps
    at_end(&unfinished);
  }
  return state;
}

void wake_all(std::vector<int>& threads) {
  std::vector<int> all;
  all.swap(threads);
  for (const int i : all) wake(i);
}

void need_shared(Site site, const char* what, const void* pointer, size_t bytes, uintptr_t alignment) {
  const char* first = static_cast<const char*>(pointer);
  if (first < block.shared || first + bytes > block.shared + shared_bytes()) {
    fail(std::string(what) + " at " + at(site) + ": " + std::to_string(bytes) + " bytes at offset " +
         std::to_string(first - block.shared) + " are not in the block's shared memory");
  }
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
    fail(std::string(what) + " at " + at(site) + ": offset " + std::to_string(first - block.shared) +
         " in shared memory is not a multiple of " + std::to_string(alignment));
  }
}

Phases& phases_of(Site site, const char* what, Mbarrier* barrier) {
  need_shared(site, what, barrier, sizeof(Mbarrier), 8);
  const auto found = current().phases.find(barrier);
  if (found == state.phases.end() || barrier->state != kMark) {
    fail(std::string(what) + " at " + at(site) + ": no mbarrier there, or overwritten");
  }
  if (found->second.maker != thread->index && found->second.made == meetings()) {
    fail(std::string(what) + " at " + at(site) + ": no sync_threads since start_mbarrier");
  }
  return found->second;
}

void end_phase(Phases& phases) {
  if (phases.pending > 0 || phases.bytes != 0) return;
  phases.parity ^= 1;
  phases.pending = phases.arrivals;
  wake_all(phases.waiting);
}

void land(Phases& phases) {
  std::vector<Copy> copies;
  copies.swap(phases.copies);
  for (const Copy& copy : copies) {
    std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
    std::memcpy(state.seen.data() + (copy.shared - block.shared), copy.global, static_cast<size_t>(copy.bytes));
    phases.bytes -= copy.bytes;
  }
  if (!copies.empty()) end_phase(phases);
}

// Element (row, k) of an operand that a descriptor describes.
class Matrix {
 public:
  Matrix(const Product& product, uint64_t descriptor, bool k_minor, const char* name)
      : product_(product), k_minor_(k_minor), name_(name) {
    if (descriptor & ~0x00003FFF3FFF3FFFull) fault("a descriptor with more than addresses and steps");
    begin_ = static_cast<int64_t>(descriptor & 0x3FFF) * 16 - kBase;
    k_step_ = static_cast<int64_t>(descriptor >> 16 & 0x3FFF) * 16;
    row_step_ = static_cast<int64_t>(descriptor >> 32 & 0x3FFF) * 16;
  }
  float operator()(int row, int k) const {
    const int64_t core = begin_ + row / 8 * row_step_ + k / 8 * k_step_;
    const int64_t offset = core + (k_minor_ ? row % 8 * 16 + k % 8 * 2 : k % 8 * 16 + row % 8 * 2);
    if (offset < 0 || offset + 2 > static_cast<int64_t>(shared_bytes())) {
      fault("element (" + std::to_string(row) + ", " + std::to_string(k) + ") at offset " + std::to_string(offset) +
            " is not in the block's shared memory");
    }
    uint16_t now, seen;
    std::memcpy(&now, block.shared + offset, 2);
    std::memcpy(&seen, state.seen.data() + offset, 2);
    if (now != seen) fault("offset " + std::to_string(offset) + " was written without fence_async");
    return bfloat16_to_float(now);
  }

 private:
  [[noreturn]] void fault(const std::string& what) const {
    fail("multiply_wide at " + at(product_.site) + ": " + name_ + " operand: " + what);
  }
  const Product& product_;
  bool k_minor_;
  const char* name_;
  int64_t begin_, k_step_, row_step_;
};

// Rows by k of a warp's left operand in registers.
void read_registers(const Product& product, int warp, float (&a)[16][16]) {
  for (int i = 0; i < kWarp; i++) {
    const Share& share = product.shares[warp * kWarp + i];
    for (int j = 0; j < 4; j++) {
      if (share.a[j] != share.a_then[j]) {
        fail("multiply_wide at " + at(product.site) + ": a register changed before the wait");
      }
      for (int half = 0; half < 2; half++) {
        a[i / 4 + j % 2 * 8][j / 2 * 8 + i % 4 * 2 + half] =
            bfloat16_to_float(static_cast<uint16_t>(share.a[j] >> 16 * half));
      }
    }
  }
}

void carry_out(Product& product, int warp) {
  const WideOperands& operands = product.operands;
  Share* shares = product.shares + warp * kWarp;
  for (int i = 0; i < kWarp; i++) {
    if (out_of_bounds(shares[i].d, static_cast<size_t>(operands.columns) * 2) ||
        (shares[i].a && out_of_bounds(shares[i].a, 16))) {
      fail("multiply_wide at " + at(product.site) + ": its registers are given up before the wait");
    }
  }
  float a[16][16];
  if (operands.a) {
    read_registers(product, warp, a);
  } else {
    const Matrix left(product, operands.left, !operands.left_by_rows, "left");
    for (int row = 0; row < 16; row++) {
      for (int k = 0; k < 16; k++) a[row][k] = left(16 * warp + row, k);
    }
  }
  const Matrix right(product, operands.right, !operands.right_by_columns, "right");
  float b[256][16];
  for (int column = 0; column < operands.columns; column++) {
    for (int k = 0; k < 16; k++) b[column][k] = right(column, k);
  }
  for (int i = 0; i < kWarp; i++) {
    Share& share = shares[i];
    if (!share.start.empty()) std::copy(share.start.begin(), share.start.end(), share.d);
    for (int j = 0; j < operands.columns / 2; j++) {
      const int row = i / 4 + j / 2 % 2 * 8, column = j / 4 * 8 + i % 4 * 2 + j % 2;
      float sum = operands.add ? share.d[j] : 0.0f;
      for (int k = 0; k < 16; k++) sum += a[row][k] * b[column][k];
      share.d[j] = sum;
    }
  }
}

// Carries out a warp's products in their order, up to `end`, as far as all its lanes have come.
void advance(Group& group, int warp, size_t end) {
  size_t& done = group.done[warp];
  for (; done < end && group.products[done]->arrived[warp] == kWarp; done++) carry_out(*group.products[done], warp);
}

Group& group_of_thread(Site site) {
  if (block.threads < (thread->index / kGroupThreads + 1) * kGroupThreads) {
    fail("multiply_wide at " + at(site) + ": not a whole warpgroup");
  }
  return current().groups[thread->index / kGroupThreads];
}

}  // namespace

uint32_t shared_offset(Site site, const void* pointer) {
  need_shared(site, "an address", pointer, 16, 16);
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - block.shared) + kBase;
}

void sync_some(Site site, int number, int threads) {
  if (passed_over("some", site)) return;
  const std::string here = "sync_some at " + at(site) + ": ";
  if (number < 1 || number > 15) fail(here + "number " + std::to_string(number));
  if (threads % kWarp != 0 || threads > block.threads) fail(here + "of " + std::to_string(threads) + " threads");
  NamedBarrier& barrier = current().named[number];
  if (!barrier.waiting.empty() && barrier.threads != threads) {
    fail(here + "of " + std::to_string(threads) + " threads, for others of " + std::to_string(barrier.threads));
  }
  barrier.threads = threads;
  if (static_cast<int>(barrier.waiting.size()) + 1 < threads) {
    barrier.waiting.push_back(thread->index);
    return park(site, "sync_some");
  }
  wake_all(barrier.waiting);
}

void fence_async(Site site) {
  if (passed_over("fence", site)) return;
  State& now = current();
  if (std::memcmp(now.seen.data(), block.shared, shared_bytes()) != 0) {
    std::memcpy(now.seen.data(), block.shared, shared_bytes());
  }
}

void start_mbarrier(Site site, Mbarrier* barrier, int arrivals) {
  need_shared(site, "start_mbarrier", barrier, sizeof(Mbarrier), 8);
  if (arrivals < 1 || arrivals > block.threads) {
    fail("start_mbarrier at " + at(site) + ": of " + std::to_string(arrivals) + " threads");
  }
  Phases& phases = current().phases[barrier];
  phases = Phases{};
  phases.arrivals = phases.pending = arrivals;
  phases.maker = thread->index;
  phases.made = meetings();
  barrier->state = kMark;
}

void arrive(Site site, Mbarrier* barrier, int bytes) {
  Phases& phases = phases_of(site, "arrive", barrier);
  if (phases.pending == 0) fail("arrive at " + at(site) + ": more threads than are expected");
  if (bytes < 0 || phases.bytes + bytes >= 1 << 20) fail("arrive at " + at(site) + ": too many bytes");
  phases.bytes += bytes;
  phases.pending--;
  end_phase(phases);
}

void wait_phase(Site site, Mbarrier* barrier, int parity) {
  if (passed_over("phase", site)) return;
  while (true) {
    Phases& phases = phases_of(site, "wait_phase", barrier);
    land(phases);
    if (phases.parity != parity) return;
    phases.waiting.push_back(thread->index);
    park(site, "wait_phase");
  }
}

void copy_bulk(Site site, void* shared, const void* global, int bytes, Mbarrier* barrier) {
  Phases& phases = phases_of(site, "copy_bulk", barrier);
  const std::string here = "copy_bulk at " + at(site) + ": ";
  if (bytes <= 0 || bytes % 16 != 0) fail(here + std::to_string(bytes) + " bytes");
  need_shared(site, "copy_bulk", shared, static_cast<size_t>(bytes), 16);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail(here + "from an address that is not a multiple of 16");
  if (out_of_bounds(global, static_cast<size_t>(bytes))) {
    fail(here + "of " + std::to_string(bytes) + " bytes, some of which are out of bounds");
  }
  std::memset(shared, 0xFF, static_cast<size_t>(bytes));
  phases.copies.push_back({static_cast<char*>(shared), static_cast<const char*>(global), bytes, site});
  if (random_bits() & 1) land(phases);
  wake_all(phases.waiting);
}

void begin_products() { group_of_thread({"begin_products", 0}).begun[thread->index % kGroupThreads] = true; }

void multiply_wide(Site site, const WideOperands& operands) {
  Group& group = group_of_thread(site);
  const int me = thread->index % kGroupThreads;
  const std::string here = "multiply_wide at " + at(site) + ": ";
  if (!group.begun[me]) fail(here + "without begin_products");
  const size_t number = static_cast<size_t>(group.issued[me]++);
  if (number == group.products.size()) {
    group.products.push_back(std::make_unique<Product>());
    group.products.back()->operands = operands;
    group.products.back()->site = site;
  }
  Product& product = *group.products[number];
  const WideOperands& first = product.operands;
  if (product.site.line != site.line || first.columns != operands.columns || !first.a != !operands.a ||
      first.left != operands.left || first.right != operands.right || first.left_by_rows != operands.left_by_rows ||
      first.right_by_columns != operands.right_by_columns || first.add != operands.add) {
    fail(here + "others of the warpgroup have another product at " + at(product.site));
  }
  Share& share = product.shares[me];
  share.d = operands.d;
  share.a = operands.a;
  if (operands.a) std::copy(operands.a, operands.a + 4, share.a_then);
  bool pending = false;
  for (size_t i = group.done[me / kWarp]; i < number; i++) pending |= group.products[i]->shares[me].d == operands.d;
  if (!pending) share.start.assign(operands.d, operands.d + operands.columns / 2);
  std::fill(operands.d, operands.d + operands.columns / 2, bits_float(0x7FC37FC3u));
  if (++product.arrived[me / kWarp] == kWarp) {
    if (random_bits() & 1) advance(group, me / kWarp, number + 1);
    wake_all(group.waiting);
  }
}

void commit_products() {
  Group& group = group_of_thread({"commit_products", 0});
  const int me = thread->index % kGroupThreads;
  group.ends[me].push_back(group.issued[me]);
}

void wait_products(Site site, int pending) {
  if (passed_over("product", site)) return;
  Group& group = group_of_thread(site);
  const int me = thread->index % kGroupThreads;
  const int groups = static_cast<int>(group.ends[me].size());
  if (groups == 0 || group.ends[me].back() != group.issued[me]) {
    fail("wait_products at " + at(site) + ": products that belong to no group");
  }
  group.begun[me] = false;
  if (groups <= pending) return;
  const size_t end = static_cast<size_t>(group.ends[me][static_cast<size_t>(groups - 1 - pending)]);
  while (group.done[me / kWarp] < end) {
    advance(group, me / kWarp, end);
    if (group.done[me / kWarp] >= end) break;
    group.waiting.push_back(thread->index);
    park(site, "wait_products");
  }
}

}  // namespace xattn::cuda::twin
