#include <algorithm>

#include "kernels/linear.cuh"
#include "launch.h"
#include "launchers.h"

namespace penstock::cuda {

namespace {

// Up to so many rows the kernel for few takes all at once; up to the other it is the better one where the kernel for many would
// leave processors idle, though it reads the weights again for every sixteen rows, from the cache mostly.
constexpr int kFewRows = 16;
constexpr int kMostFewRows = 64;
constexpr int kPanelsOfBlock = kManyRowsWarps * kPanelsOfWarp;
constexpr size_t kMostShared = 96 << 10;

size_t few_shared(const DeviceMatrix& matrix, int tiles) { return size_t(matrix.slices()) * tiles * 512; }

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

// No bit depends on it.
bool few_rows(const Product* products, int count, int rows, int processors) {
  size_t shared = 0;
  unsigned blocks = 0;
  for (int i = 0; i < count; ++i) {
    shared = std::max(shared, few_shared(products[i].matrix, rows > kTileRows ? 2 : 1));
    blocks += blocks_of_many(products[i].matrix);
  }
  return shared <= kMostShared && (rows <= kFewRows || (rows <= kMostFewRows && blocks < static_cast<unsigned>(processors)));
}

}  // namespace

void linear(const Queue& queue, const Product* products, int count, const uint16_t* x, size_t x_stride, int rows) {
  if (few_rows(products, count, rows, queue.device.facts().processors)) {
    linear_few(queue, products, count, x, x_stride, rows);
  } else {
    linear_many(queue, products, count, x, x_stride, rows);
  }
}

void linear_few(const Queue& queue, const Product* products, int count, const uint16_t* x, size_t x_stride, int rows) {
  for_each_kind(products, count, [&](WeightKind kind, const Products& same) {
    unsigned panels = 0;
    size_t shared = 0;
    const int tiles = rows > kTileRows ? 2 : 1;
    for (int i = 0; i < same.count; ++i) {
      panels += same.product[i].matrix.panels;
      shared = std::max(shared, few_shared(same.product[i].matrix, tiles));
    }
    const Size3 grid = {panels, static_cast<unsigned>((rows + tiles * kTileRows - 1) / (tiles * kTileRows))};
    with_kind(kind, [&]<WeightKind k>() {
      const auto kernel = tiles == 1 ? linear_few_rows_kernel<k, 1> : linear_few_rows_kernel<k, 2>;
      launch(queue.device, queue.stream, "linear_few_rows", kernel, grid, {kFewRowsWarps * 32}, shared, same, x, x_stride, rows);
    });
  });
}

void linear_many(const Queue& queue, const Product* products, int count, const uint16_t* x, size_t x_stride, int rows) {
  for_each_kind(products, count, [&](WeightKind kind, const Products& same) {
    unsigned blocks = 0;
    for (int i = 0; i < same.count; ++i) blocks += blocks_of_many(same.product[i].matrix);
    const Size3 grid = {blocks, static_cast<unsigned>((rows + kManyRows - 1) / kManyRows)};
    with_kind(kind, [&]<WeightKind k>() {
      launch(queue.device, queue.stream, "linear_many_rows", linear_many_rows_kernel<k>, grid, {kManyRowsWarps * 32}, kManyRowsShared, same, x,
             x_stride, rows);
    });
  });
}

}  // namespace penstock::cuda
