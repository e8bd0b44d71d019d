#include <algorithm>

#include "kernels/linear.cuh"
#include "launch.h"
#include "launchers.h"

namespace penstock::cuda {

namespace {

// Up to so many rows the kernel for few takes all at once.
constexpr int kFewRows = 16;
// Of a block; what every device with compute capability 8.0 or later has.
constexpr size_t kMostShared = 96 << 10;
// Blocks of the kernel for many rows that a processor has at once.
constexpr int kBlocksOfProcessor = 2;

// Calls `body` with each run of products of one kind.
template <class Body>
void for_each_kind(const Product* products, int count, Body body) {
  for (int first = 0; first < count;) {
    Products same = {};
    const WeightKind kind = products[first].matrix.kind;
    while (first < count && products[first].matrix.kind == kind && same.count < kMostProducts) same.product[same.count++] = products[first++];
    body(kind, same);
  }
}

// Calls `body` with the kind as a constant.
template <class Body>
void with_kind(WeightKind kind, Body body) {
  switch (kind) {
    case WeightKind::Half: return body.template operator()<WeightKind::Half>();
    case WeightKind::Byte: return body.template operator()<WeightKind::Byte>();
    case WeightKind::ByteHalf: return body.template operator()<WeightKind::ByteHalf>();
    case WeightKind::ByteOffset: return body.template operator()<WeightKind::ByteOffset>();
    case WeightKind::Nibble: return body.template operator()<WeightKind::Nibble>();
    case WeightKind::NibbleOffset: return body.template operator()<WeightKind::NibbleOffset>();
    case WeightKind::NibbleZero: return body.template operator()<WeightKind::NibbleZero>();
  }
}

unsigned blocks_of_many(const DeviceMatrix& matrix) { return (matrix.panels + kPanelsOfBlock - 1) / kPanelsOfBlock; }

bool fit_few(const Product* products, int count, int rows) {
  size_t shared = 0;
  for (int i = 0; i < count; ++i) {
    const DeviceMatrix& matrix = products[i].matrix;
    with_kind(matrix.kind, [&]<WeightKind k>() {
      shared = std::max(shared, rows > kTileRows ? few_rows_shared_bytes<k, 2>(matrix.slices()) : few_rows_shared_bytes<k, 1>(matrix.slices()));
    });
  }
  return shared <= kMostShared;
}

// Slices of a block where blocks share them, else 0.
int slices_each(int slices, unsigned blocks, int processors) {
  if (blocks == 0 || blocks >= static_cast<unsigned>(processors)) return 0;
  const int shares = std::max(1, static_cast<int>(processors * kBlocksOfProcessor / blocks));
  return std::max(1, slices / shares);
}

}  // namespace

size_t partial_bytes(int outputs, int inputs) {
  DeviceMatrix matrix;
  matrix.panels = (outputs + kPanelOutputs - 1) / kPanelOutputs;
  matrix.chunks = (inputs + kChunkInputs - 1) / kChunkInputs;
  return matrix.slices() * blocks_of_many(matrix) * kPartialOfBlock * sizeof(float4);
}

// No bit depends on which it is.
void linear(const Queue& queue, const Product* products, int count, const LinearInput& input, const Partials& partials) {
  if (input.rows <= kFewRows && fit_few(products, count, input.rows)) {
    linear_few(queue, products, count, input);
  } else {
    linear_many(queue, products, count, input, partials);
  }
}

void linear_few(const Queue& queue, const Product* products, int count, const LinearInput& input) {
  for_each_kind(products, count, [&](WeightKind kind, const Products& same) {
    unsigned panels = 0;
    for (int i = 0; i < same.count; ++i) panels += same.product[i].matrix.panels;
    const int slices = same.product[0].matrix.slices();
    with_kind(kind, [&]<WeightKind k>() {
      const auto put = [&]<int kTiles>() {
        const Size3 grid = {panels, static_cast<unsigned>((input.rows + kTiles * kTileRows - 1) / (kTiles * kTileRows))};
        launch(queue.device, queue.stream, "linear_few_rows", linear_few_rows_kernel<k, kTiles>, grid, {kFewRowsWarps * 32},
               few_rows_shared_bytes<k, kTiles>(slices), same, input.x, input.stride, input.rows);
      };
      input.rows > kTileRows ? put.template operator()<2>() : put.template operator()<1>();
    });
  });
}

void linear_many(const Queue& queue, const Product* products, int count, const LinearInput& input, const Partials& partials) {
  for_each_kind(products, count, [&](WeightKind kind, const Products& same) {
    unsigned blocks = 0;
    for (int i = 0; i < same.count; ++i) blocks += blocks_of_many(same.product[i].matrix);
    const int slices = same.product[0].matrix.slices();
    const bool room = input.rows <= kManyRows && slices * blocks * kPartialOfBlock * sizeof(float4) <= partials.bytes;
    const int each = room ? slices_each(slices, blocks, queue.device.facts().processors) : 0;
    float4* const partial = static_cast<float4*>(partials.at);
    const Size3 grid = {blocks, static_cast<unsigned>((input.rows + kManyRows - 1) / kManyRows),
                        static_cast<unsigned>(each == 0 ? 1 : (slices + each - 1) / each)};
    with_kind(kind, [&]<WeightKind k>() {
      launch(queue.device, queue.stream, "linear_many_rows", linear_many_rows_kernel<k>, grid, {kManyRowsWarps * 32}, many_rows_shared_bytes<k>(),
             same, input.x, input.stride, input.rows, each, partial);
    });
    if (each == 0) return;
    const unsigned tiles = static_cast<unsigned>((input.rows + kTileRows - 1) / kTileRows);
    launch(queue.device, queue.stream, "add_slices", add_slices_kernel, {blocks, kPanelsOfWarp * tiles}, {kManyRowsWarps * 32}, 0, same, input.rows,
           partial);
  });
}

}  // namespace penstock::cuda
