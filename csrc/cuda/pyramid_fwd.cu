// The pyramid projection, forward: z = sum_s upsample_s(W_s x_s), out = V relu(scale z + shift) + bias.
//
// Plan: the coarse levels are projected at their own resolution (pyramid_project.cu). Then a block has a
// tile of the finest level's tokens, rows by columns of its image, and goes through the hidden channels.
// Interpolation is linear in few pixels and the same for all of these, so it is a product too:
//
//   z = [W_0 | products of the pixels around the tile] [x_0; shares of these pixels]
//
// The right factor is made once a tile; the left one goes by in pieces, the next one on its way. Tokens are
// rows of what a warp sums: its part of z, activated in registers, is the left operand of the classifier's
// product as it lies. z is never stored, unless a backward pass or statistics ask for it.
//
// A share of 0 times infinity or NaN would be NaN, at every token of a tile. The first launch leaves a note
// of such products; tiles that read one take it as 0 and add it where it belongs.
#include <algorithm>
#include <vector>

#include "operators.h"
#include "pyramid_tile.h"

namespace xattn::cuda {
namespace pyramid {
namespace {

template <class P, int kOut, Mode kMode>
XATTN_KERNEL(kThreads, 2)
pixel_kernel(XATTN_PARAMETER Arguments args) {
  XATTN_KEEP_LOOP
  for (int64_t work = block_index(); work < args.works; work += block_count()) Block<P, kOut, kMode>(args, work).run();
}

// Pixels along an axis that `extent` of `length` tokens lie between, at most, and whether they are apart.
int span_of(int extent, int64_t length, int64_t size, bool* apart) {
  int most = 0;
  for (int64_t begin = 0; begin < length; begin += extent) {
    const Tap first = tap(begin, length, size), last = tap(std::min(begin + extent, length) - 1, length, size);
    most = std::max(most, last.first + (last.inside ? 1 : 0) - first.first + 1);
  }
  *apart = 2 * extent < most;
  return std::min(most, 2 * extent);
}

int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Choice {
  int tokens, hidden, depth;
};
// The first of which two blocks fit a processor is taken, else the first of which one does.
constexpr Choice kChoices[] = {{128, 64, 96}, {128, 64, 48}, {64, 64, 96}, {64, 64, 48},
                               {64, 32, 48},  {32, 64, 48},  {32, 64, 16}};

// A call's sizes, and the numbers of its coarse levels.
struct Layout {
  Geometry geometry;
  std::vector<int64_t> numbers;
};

// The tile of so many tokens that multiplies least.
template <class E>
Layout tile_of(const PyramidProblem& problem, bool project, int tokens) {
  Layout best{};
  int64_t least = -1;
  const int64_t height = project ? problem.levels[0].height : 1, width = problem.levels[0].x.tokens / height;
  for (int rows = 1; tokens / rows >= 16 && (project || rows == 1); rows *= 2) {
    Layout layout{};
    Geometry& g = layout.geometry;
    g.height = rows;
    g.width = tokens / rows;
    g.tokens = tokens;
    int64_t slots = 0, row = 0;
    for (int64_t s = 1; s < problem.levels.size && project; ++s) {
      const Level& level = problem.levels[s];
      bool rows_apart = false, columns_apart = false;
      const int64_t y = span_of(g.height, height, level.height, &rows_apart);
      const int64_t x = span_of(g.width, width, level.width, &columns_apart);
      layout.numbers.insert(layout.numbers.end(), {level.channels, 0, level.height, level.width, row, slots, y, x,
                                                   rows_apart ? 1 : 0, columns_apart ? 1 : 0});
      slots += y * x;
      row += problem.batch * level.height * level.width;
    }
    g.slots = static_cast<int>(padded(slots));
    const int64_t products = project ? padded(problem.levels[0].channels) + g.slots : 0;
    const int64_t work = ceil_div(height, g.height) * ceil_div(width, g.width) * (products + padded(problem.outputs));
    if (least < 0 || work < least) {
      best = layout;
      least = work;
    }
  }
  return best;
}

template <class P>
Geometry with_memory(Geometry g, const PyramidProblem& problem, bool project, int hidden, int depth, int outputs) {
  using E = typename P::Element;
  constexpr int kElement = static_cast<int>(sizeof(E)), kFloat = static_cast<int>(sizeof(float));
  const auto aligned = [](int bytes) { return (bytes + 15) / 16 * 16; };
  const int channels = static_cast<int>(padded(problem.levels[0].channels));
  g.hidden = hidden;
  g.columns = hidden * g.tokens / kTokens / kWarps;
  g.depth = depth;
  g.outputs = outputs;
  int left = tile_elements<P>(hidden, g.tokens) * kElement;
  if (project) {
    g.shares = aligned(tile_elements<P>(channels, g.tokens) * kElement);
    g.rows = g.shares + aligned(g.tokens * (g.slots + P::kPad) * kElement);
    g.flags = g.rows + aligned(g.slots * static_cast<int>(sizeof(int64_t)));
    g.corners = g.flags + aligned(kWarps * static_cast<int>(sizeof(int)));
    const int levels = static_cast<int>(problem.levels.size) - 1;
    g.stages = g.corners + aligned(levels * g.tokens * static_cast<int>(sizeof(int)));
    left = std::max(hidden * row_stride<P>(depth), depth * (hidden + kPad)) * kElement;
  }
  g.classifier = aligned(left);
  g.vectors = g.classifier + aligned(outputs * (hidden + kPad) * kElement);
  g.stage = g.vectors + aligned(2 * hidden * kFloat);
  g.map = g.stages + std::max(2 * g.stage, aligned(outputs * (g.tokens + 4) * kFloat));
  const bool keeps = project && (problem.map != nullptr || problem.mean != nullptr);
  g.shared = g.map + (keeps ? hidden * (g.tokens + 4) * kFloat : 0);
  return g;
}

template <class P>
Layout choose(const PyramidProblem& problem, bool project, int outputs) {
  const Limits device = limits();
  const int64_t groups = ceil_div(problem.outputs, outputs);
  Layout last{};
  for (const int limit : {device.shared_bytes / 2 - 1024, device.shared_bytes}) {
    int tokens = 0;
    for (const Choice& choice : kChoices) {
      if (choice.tokens != tokens) last = tile_of<typename P::Element>(problem, project, choice.tokens);
      tokens = choice.tokens;
      last.geometry = with_memory<P>(last.geometry, problem, project, choice.hidden, choice.depth, outputs);
      // Few large tiles would leave processors without one.
      const int64_t works = ceil_div(problem.levels[0].x.tokens, tokens) * problem.batch * groups;
      if (last.geometry.shared <= limit && (works >= 2 * device.processors || tokens < 128)) return last;
    }
  }
  return last;
}

template <class P>
void start(Arguments args, Mode mode, Stream stream) {
  const auto run = [&](void (*kernel)(Arguments), const char* name) {
    launch(kernel, name, args.works, kThreads, static_cast<size_t>(args.geometry.shared), stream, args);
  };
  if (mode == Mode::kTraining)
    run(pixel_kernel<P, 6, Mode::kTraining>, "pyramid_training");
  else if (mode == Mode::kStored)
    run(pixel_kernel<P, 6, Mode::kStored>, "pyramid_classify");
  else if (args.geometry.outputs <= 16)
    run(pixel_kernel<P, 2, Mode::kForward>, "pyramid_forward");
  else
    run(pixel_kernel<P, 6, Mode::kForward>, "pyramid_forward");
}

template <class P>
void run(const PyramidProblem& problem, const PyramidWeights& weights, const Call& call, bool project) {
  constexpr int kMostOutputs = 48;
  const Level& first = problem.levels[0];
  const int64_t outputs = padded(problem.outputs), hidden = padded(problem.hidden);
  const int64_t coarse = project ? problem.levels.size - 1 : 0;
  const int64_t share = padded(ceil_div(outputs, ceil_div(outputs, kMostOutputs)));
  const Layout layout = choose<P>(problem, project, static_cast<int>(share));
  const Geometry& g = layout.geometry;

  TableBuilder table;
  Scratch memory;
  std::vector<View> features, matrices;
  std::vector<int64_t> starts{0}, numbers, levels = layout.numbers;
  int64_t rows = 0, elements = 0, tiles_of_weights = 0;
  const auto add_matrix = [&](const View& view, int64_t count, int64_t padded_count) {
    matrices.push_back(view);
    numbers.insert(numbers.end(), {count, padded_count, padded(view.tokens), elements, tiles_of_weights});
    elements += padded_count * padded(view.tokens);
    tiles_of_weights += ceil_div(padded_count, kPackedTile) * ceil_div(padded(view.tokens), kPackedTile);
  };
  if (project) add_matrix(weights.levels[0], problem.hidden, hidden);
  for (int64_t s = 1; s <= coarse; ++s) {
    const View& x = problem.levels[s].x;
    features.push_back(x);
    starts.push_back(starts.back() +
                     ceil_div(x.tokens, kProjectedPixels) * ceil_div(hidden, kProjectedHidden) * problem.batch);
    rows += problem.batch * x.tokens;
    levels[static_cast<size_t>((s - 1) * kLevelNumbers + kWeight)] = elements;
    add_matrix(weights.levels[s], problem.hidden, hidden);
  }
  PyramidScratch scratch{};
  scratch.hidden = problem.hidden;
  scratch.padded = hidden;
  scratch.flag_groups = ceil_div(hidden, kFlagged);
  scratch.channels = padded(first.channels);
  scratch.outputs = outputs;
  scratch.classifier = elements;
  add_matrix(weights.classifier, problem.outputs, outputs);
  PyramidWeightsLayout laid_out{};
  laid_out.views = table.add({matrices.data(), static_cast<int64_t>(matrices.size())});
  laid_out.numbers = table.add(numbers);
  PyramidProjection projection{};
  projection.features = table.add({features.data(), coarse});
  projection.numbers = table.add(levels);
  projection.starts = table.add(starts);

  const int64_t tiles =
      project ? ceil_div(first.height, g.height) * ceil_div(first.width, g.width) : ceil_div(first.x.tokens, g.width);
  const int64_t element = static_cast<int64_t>(sizeof(typename P::Element));
  const int64_t products = memory.reserve<char>(rows * hidden * element);
  const int64_t flags = memory.reserve<int>(rows * scratch.flag_groups);
  const int64_t weight = memory.reserve<char>(elements * element);
  const int64_t moments =
      memory.reserve<float>(problem.mean != nullptr ? problem.batch * tiles * 2 * problem.hidden : 0);
  table.reserve(memory);
  memory.allocate(call);
  const Table device_table = table.finish(memory, call.stream);
  scratch.products = memory.at<char>(products);
  scratch.flags = memory.at<int>(flags);
  scratch.weights = memory.at<char>(weight);

  laid_out.table = device_table;
  laid_out.dtype = weights.dtype;
  laid_out.count = static_cast<int>(matrices.size());
  laid_out.works = tiles_of_weights;
  laid_out.to = scratch.weights;
  start_pyramid_weights(laid_out, problem.dtype, call.tf32, call.stream);
  projection.table = device_table;
  projection.dtype = problem.dtype;
  projection.levels = static_cast<int>(coarse);
  projection.batch = problem.batch;
  projection.works = starts.back();
  projection.scratch = scratch;
  start_pyramid_projection(projection, call.tf32, call.stream);

  Arguments args{};
  args.table = device_table;
  args.dtype = problem.dtype;
  args.numbers = projection.numbers;
  args.levels = projection.levels;
  args.batch = problem.batch;
  args.channels = first.channels;
  args.hidden = problem.hidden;
  args.outputs = problem.outputs;
  args.height = project ? first.height : 1;
  args.width = project ? first.width : first.x.tokens;
  args.tiles = tiles;
  args.groups = problem.output.data != nullptr ? ceil_div(outputs, g.outputs) : 1;
  args.works = args.groups * problem.batch * tiles;
  args.x = first.x;
  args.map = {static_cast<char*>(problem.map), problem.hidden * first.x.tokens, first.x.tokens, 1, first.x.tokens};
  args.output = problem.output;
  args.scratch = scratch;
  args.scale = static_cast<const float*>(problem.scale);
  args.shift = static_cast<const float*>(problem.shift);
  args.bias = static_cast<const float*>(problem.classifier_bias);
  args.moments = problem.mean != nullptr ? memory.at<float>(moments) : nullptr;
  args.geometry = g;
  const bool keeps = problem.map != nullptr || problem.mean != nullptr;
  start<P>(args, !project ? Mode::kStored : keeps ? Mode::kTraining : Mode::kForward, call.stream);
  if (problem.mean != nullptr)
    start_pyramid_moments({args.moments, problem.hidden, problem.batch, args.height, args.width, g.height, g.width,
                           static_cast<float*>(problem.mean), static_cast<float*>(problem.deviations)},
                          call.stream);
}

void run_as(const PyramidProblem& problem, const PyramidWeights& weights, const Call& call, bool project) {
  const DeviceGuard guard(call.device);
  if (problem.dtype == Dtype::kBFloat16)
    run<BFloat16Products>(problem, weights, call, project);
  else if (problem.dtype == Dtype::kFloat16 || call.tf32)
    run<Tf32Products>(problem, weights, call, project);
  else
    run<IeeeProducts>(problem, weights, call, project);
}

}  // namespace
}  // namespace pyramid

void pyramid_forward(const PyramidProblem& problem, const PyramidWeights& weights, const Call& call) {
  pyramid::run_as(problem, weights, call, true);
}

void pyramid_classify(const PyramidProblem& problem, const PyramidWeights& weights, const Call& call) {
  pyramid::run_as(problem, weights, call, false);
}

}  // namespace xattn::cuda
