// Tiles of 64 tokens as products of a warpgroup take them: cores (sm90.h) in shared memory, to and from
// tensors of any strides, and fragments in registers.
//
// A tile lies in cores [minor / 8][major / 8], with what is side by side in the tensor as minor dimension.
#pragma once

#include "sm90.h"
#include "tile.h"

namespace xattn::cuda {

constexpr int kWideTokens = 64;  // rows of a product
constexpr int kCore = 128;       // bytes

XATTN_DEVICE int warpgroup() { return thread_index() / kWarpgroup; }
XATTN_DEVICE int thread_of_group() { return thread_index() % kWarpgroup; }

// A matrix of `minors` x `majors` elements in cores.
struct CoreTile {
  char* data;
  bool token_minor;
  int minors, majors;  // multiples of 8
  XATTN_DEVICE int minor_step() const { return majors / 8 * kCore; }
  XATTN_DEVICE char* row(int major, int minor) const {
    return data + minor / 8 * minor_step() + major / 8 * kCore + major % 8 * 16;
  }
};
XATTN_DEVICE CoreTile core_tile(char* data, bool token_minor, int channels) {
  return {data, token_minor, token_minor ? kWideTokens : channels, token_minor ? channels : kWideTokens};
}

// Walks the threads of a warpgroup over a tile in pieces of kElements: body(major, minor, piece). Eight
// threads, or their pieces of 16 bytes, are the rows of a core: no two of a bank.
template <int kElements, class Body>
XATTN_DEVICE void for_pieces(const CoreTile& tile, const Body& body) {
  constexpr int kPer = 8 / kElements, kStep = kWarpgroup / 8 / kPer;  // pieces of a row; cores of a step
  static_assert(kStep >= 1, "a step has at least one core");
  const int i = thread_of_group(), minor = i % kPer * kElements, major = i / kPer % 8;
  const int chunks = tile.minors / 8;
  int core = i / kPer / 8, block = 0;
  XATTN_KEEP_LOOP
  while (true) {
    while (core >= chunks) {
      core -= chunks;
      ++block;
    }
    if (8 * block >= tile.majors) break;
    body(8 * block + major, 8 * core + minor);
    core += kStep;
  }
}

template <int kBytes>
XATTN_DEVICE void copy_cores(const View& view, const Place& place, const CoreTile& to) {
  constexpr int kPer = kBytes / 2;
  const int majors = to.token_minor ? place.channels : place.tokens;
  const int minors = to.token_minor ? place.tokens : place.channels;
  const int64_t step = to.token_minor ? view.channel_stride : view.token_stride;
  const uint16_t* from = reinterpret_cast<const uint16_t*>(view.data) + element_of(view, place, 0, 0);
  for_pieces<kPer>(to, [&](int major, int minor) {
    const int left = major < majors ? minors - minor : 0;
    const int count = left < 0 ? 0 : left > kPer ? kPer : left;
    copy_async<kBytes>(to.row(major, minor) + minor % 8 * 2, count > 0 ? from + major * step + minor : from, 2 * count);
  });
}

// A tile from global memory by a warpgroup, zero beyond `place`. To be waited for as load_tile is.
XATTN_DEVICE void load_cores(const View& view, const Access& access, const Place& place, const CoreTile& to) {
  switch (access.bytes) {
    case 16:
      return copy_cores<16>(view, place, to);
    case 8:
      return copy_cores<8>(view, place, to);
    case 4:
      return copy_cores<4>(view, place, to);
  }
  for_pieces<1>(to, [&](int major, int minor) {
    const int channel = to.token_minor ? major : minor, token = to.token_minor ? minor : major;
    uint16_t x = 0;
    if (channel < place.channels && token < place.tokens)
      x = reinterpret_cast<const uint16_t*>(view.data)[element_of(view, place, channel, token)];
    reinterpret_cast<uint16_t*>(to.row(major, minor))[minor % 8] = x;
  });
}

template <int kBytes>
XATTN_DEVICE void write_cores(const View& view, const Place& place, const CoreTile& from) {
  constexpr int kPer = kBytes / 2;
  struct alignas(kBytes) Vector {
    uint16_t x[kPer];
  };
  const int majors = from.token_minor ? place.channels : place.tokens;
  const int minors = from.token_minor ? place.tokens : place.channels;
  const int64_t step = from.token_minor ? view.channel_stride : view.token_stride;
  uint16_t* to = reinterpret_cast<uint16_t*>(view.data) + element_of(view, place, 0, 0);
  for_pieces<kPer>(from, [&](int major, int minor) {
    if (major >= majors || minor >= minors) return;
    uint16_t* there = to + major * step + minor;
    const uint16_t* here = reinterpret_cast<const uint16_t*>(from.row(major, minor)) + minor % 8;
    if (minors - minor >= kPer) {
      *reinterpret_cast<Vector*>(there) = *reinterpret_cast<const Vector*>(here);
    } else {
      for (int j = 0; j < minors - minor; ++j) there[j] = here[j];
    }
  });
}

// A tile to global memory by a warpgroup; it lies as the tensor does.
XATTN_DEVICE void store_cores(const View& view, const Access& access, const Place& place, const CoreTile& from) {
  switch (access.bytes) {
    case 16:
      return write_cores<16>(view, place, from);
    case 8:
      return write_cores<8>(view, place, from);
    case 4:
      return write_cores<4>(view, place, from);
  }
  for_pieces<1>(from, [&](int major, int minor) {
    const int channel = from.token_minor ? major : minor, token = from.token_minor ? minor : major;
    if (channel < place.channels && token < place.tokens)
      reinterpret_cast<uint16_t*>(view.data)[element_of(view, place, channel, token)] =
          reinterpret_cast<const uint16_t*>(from.row(major, minor))[minor % 8];
  });
}

// Tokens x channels of bfloat16 in registers as left operands of products: 16 channels a step.
template <int kSteps>
struct WideFragments {
  uint32_t v[kSteps][4];

  // Channels from 8 kFirst on: accumulators of a product, rounded in pairs. Returns the bits of all.
  template <int kFirst, int kCount, class Pack>
  XATTN_DEVICE uint32_t set(const float (&d)[kCount], const Pack& pack) {
    uint32_t bits = 0;
    XATTN_UNROLL
    for (int n = 0; n < kCount / 4; ++n) {
      const int eight = kFirst + n;
      XATTN_UNROLL
      for (int r = 0; r < 2; ++r) {
        uint32_t& to = v[eight / 2][eight % 2 * 2 + r];
        to = pack(d[4 * n + 2 * r], d[4 * n + 2 * r + 1]);
        bits |= to;
      }
    }
    return bits;
  }
  // Zero from channel `channels` on, of which there are kWidth - 7 at least: products with weights that are zero there
  // would otherwise make NaN of infinities.
  template <int kWidth>
  XATTN_DEVICE void clear_from(int channels) {
    constexpr int kLast = kWidth / 8 - 1;
    if constexpr (kLast % 2 == 0) v[kSteps - 1][2] = v[kSteps - 1][3] = 0;
    if (channels == kWidth) return;
    const int left = channels - 8 * kLast - 2 * (lane() % 4);
    const uint32_t keep = left <= 0 ? 0u : left == 1 ? 0xFFFFu : 0xFFFFFFFFu;
    v[kLast / 2][kLast % 2 * 2] &= keep;
    v[kLast / 2][kLast % 2 * 2 + 1] &= keep;
  }
  // Zero from token `tokens` on.
  XATTN_DEVICE void clear_rows_from(int tokens) {
    if (tokens >= kWideTokens) return;
    const int row = warp() % 4 * 16 + lane() / 4;
    XATTN_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      XATTN_UNROLL
      for (int i = 0; i < 4; ++i)
        if (row + i % 2 * 8 >= tokens) v[step][i] = 0;
    }
  }
  // One in channel `channel`, which is one of the last eight, or the first after them.
  template <int kWidth>
  XATTN_DEVICE void set_one(int channel) {
    constexpr int kLast = kWidth / 8 - 1;
    const int at = channel - 8 * kLast;
    const uint32_t one = lane() % 4 == at % 8 / 2 ? 0x3F80u << at % 2 * 16 : 0u;
    if (at < 8) {
      v[kLast / 2][kLast % 2 * 2] |= one;
      v[kLast / 2][kLast % 2 * 2 + 1] |= one;
    } else if constexpr (kLast % 2 == 0) {
      v[kSteps - 1][2] |= one;
      v[kSteps - 1][3] |= one;
    }
  }
  XATTN_DEVICE void hold_all() {
    XATTN_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      XATTN_UNROLL
      for (int i = 0; i < 4; ++i) hold(v[step][i]);
    }
  }
  // From cores and to them; `tile` has 16 kSteps channels.
  XATTN_DEVICE void load(const CoreTile& tile) {
    const int matrix = lane() / 8, r = lane() % 8, token = warp() % 4 * 16 + matrix % 2 * 8;
    XATTN_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const int channel = 16 * step + matrix / 2 * 8;
      if (tile.token_minor)
        load_matrices_transposed(v[step], tile.row(channel + r, token));
      else
        load_matrices(v[step], tile.row(token + r, channel));
    }
  }
  XATTN_DEVICE void store(const CoreTile& tile) const {
    const int matrix = lane() / 8, r = lane() % 8, token = warp() % 4 * 16 + matrix % 2 * 8;
    XATTN_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const int channel = 16 * step + matrix / 2 * 8;
      if (tile.token_minor)
        store_matrices_transposed(tile.row(channel + r, token), v[step]);
      else
        store_matrices(tile.row(token + r, channel), v[step]);
    }
  }
};

// Accumulators start as the bias of their channels.
template <int kCount>
XATTN_DEVICE void start_with(float (&d)[kCount], const float* bias) {
  struct alignas(8) Pair {
    float x, y;
  };
  XATTN_UNROLL
  for (int n = 0; n < kCount / 4; ++n) {
    const Pair pair = *reinterpret_cast<const Pair*>(bias + 8 * n + 2 * (lane() % 4));
    d[4 * n] = d[4 * n + 2] = pair.x;
    d[4 * n + 1] = d[4 * n + 3] = pair.y;
  }
}

// d = a b or d += a b: b a slice of a matrix [columns][16 kSteps] in cores.
template <int kSteps, int kCount>
XATTN_DEVICE void multiply_fragments(float (&d)[kCount], WideFragments<kSteps>& a, const char* b, bool add) {
  const uint64_t right = describe(b, kCore, 2 * kSteps * kCore);
  hold(d);
  a.hold_all();
  begin_products();
  XATTN_UNROLL
  for (int k = 0; k < kSteps; ++k)
    multiply_wide<false>(d, a.v[k], right + static_cast<uint64_t>(k * 2 * kCore / 16), add || k > 0);
  commit_products();
}

// d += x b: x a tile of 16 kSteps channels in cores.
template <int kSteps, int kCount>
XATTN_DEVICE void multiply_tile(float (&d)[kCount], const CoreTile& x, const char* b) {
  const uint64_t right = describe(b, kCore, 2 * kSteps * kCore);
  const uint64_t left =
      x.token_minor ? describe(x.data, kCore, x.minor_step()) : describe(x.data, x.minor_step(), kCore);
  hold(d);
  // By one lane's value for all, which tells the compiler that warps stay together.
  if (shuffle(static_cast<int>(x.token_minor), 0) != 0) {
    begin_products();
    XATTN_UNROLL
    for (int k = 0; k < kSteps; ++k)
      multiply_wide<true, false>(d, left + static_cast<uint64_t>(k * 2 * kCore / 16),
                                 right + static_cast<uint64_t>(k * 2 * kCore / 16), true);
    commit_products();
  } else {
    begin_products();
    XATTN_UNROLL
    for (int k = 0; k < kSteps; ++k)
      multiply_wide<false, false>(d, left + static_cast<uint64_t>(k * 2 * (kWideTokens / 8 * kCore) / 16),
                                  right + static_cast<uint64_t>(k * 2 * kCore / 16), true);
    commit_products();
  }
}

// When they are done, and only then, `d` may be read.
template <int kCount>
XATTN_DEVICE void finish_products(float (&d)[kCount]) {
  wait_products<0>();
  hold(d);
}

}  // namespace xattn::cuda
