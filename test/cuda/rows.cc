// What is done row by row, each against a plain loop.
#include <cstring>
#include <limits>

#include "../../kernels/src/cpu/kv_codes.h"
#include "../../kernels/src/cuda/packed_weights.h"
#include "../../kernels/src/fixed_math.h"
#include "check.h"

namespace penstock::cuda::test {

namespace {

Add norms("RMS norm: with and without what the residual stream gains, of all rows and of some", [] {
  Bench bench;
  Random random(1);
  for (const int length : {64, 576, 1000}) {
    const int rows = 5;
    const size_t stride = (length + 63) / 64 * 64;
    const std::vector<float> x = normals(random, rows * stride), z = normals(random, rows * stride), weight = normals(random, length);
    const std::vector<int32_t> chosen = {4, 0, 2};
    for (const bool gains : {false, true}) {
      for (const bool some : {false, true}) {
        float* stream = bench.upload(x);
        uint16_t* y = bench.room<uint16_t>(rows * stride);
        const int count = some ? 3 : rows;
        rms_norm(bench.queue(), count,
                 {stream, gains ? bench.upload(z) : nullptr, stride, some ? bench.upload(chosen) : nullptr, bench.upload(weight), length, 1e-5f, y, stride});
        const std::vector<float> found = floats(bench.download(y, rows * stride));
        const std::vector<float> after = bench.download(stream, rows * stride);
        for (int i = 0; i < count; ++i) {
          const int row = some ? chosen[i] : i;
          double squares = 0.0;
          std::vector<float> gained(length);
          for (int k = 0; k < length; ++k) {
            const float value = gains ? x[row * stride + k] + z[row * stride + k] : x[row * stride + k];
            expect(after[row * stride + k] == (some ? x[row * stride + k] : value), "the residual stream is exact");
            gained[k] = value;
            squares += double(value) * value;
          }
          const double scale = 1.0 / std::sqrt(squares / length + 1e-5);
          for (int k = 0; k < length; ++k) {
            const double wanted = gained[k] * scale * weight[k];
            expect(std::fabs(found[i * stride + k] - wanted) <= 5e-4 * std::fabs(wanted) + 1e-7, "element " + std::to_string(k) + " is right");
          }
        }
      }
    }
  }
});

Add gate("SwiGLU: silu of the gate times the up projection, far from zero too", [] {
  Bench bench;
  Random random(2);
  const int rows = 3, length = 300;
  std::vector<float> gate = normals(random, rows * length, 4.0f);
  gate[0] = -200.0f;
  gate[1] = 200.0f;
  const std::vector<float> up = normals(random, rows * length);
  uint16_t* y = bench.room<uint16_t>(rows * 320);
  swiglu(bench.queue(), rows, bench.upload(gate), bench.upload(up), length, length, y, 320);
  const std::vector<float> found = floats(bench.download(y, rows * 320));
  for (int row = 0; row < rows; ++row) {
    for (int k = 0; k < length; ++k) {
      const double g = gate[row * length + k];
      const double wanted = g / (1.0 + std::exp(-g)) * up[row * length + k];
      expect(std::fabs(found[row * 320 + k] - wanted) <= 5e-4 * std::fabs(wanted) + 1e-7, "element " + std::to_string(k) + " is right");
    }
  }
});

Add embedding("embedding: rows of weights as tensor cores see them, and the angles of positions up to 100,000", [] {
  Bench bench;
  Random random(3);
  const int outputs = 37, inputs = 160, pairs = 8;
  for (int k = 0; k < kWeightKinds; ++k) {
    DeviceMatrix m;
    m.kind = static_cast<WeightKind>(k);
    m.outputs = outputs;
    m.inputs = inputs;
    m.panels = 3;
    m.chunks = 3;
    std::vector<uint8_t> levels(m.level_bytes()), scales(m.scale_bytes());
    for (uint8_t& byte : levels) byte = static_cast<uint8_t>(random());
    for (size_t i = 0; i + 1 < scales.size(); i += 2) {
      const uint16_t half = half_of_float(std::uniform_real_distribution<float>(0.01f, 0.02f)(random));
      std::memcpy(&scales[i], &half, 2);
    }
    if (m.kind == WeightKind::Half)
      for (size_t i = 1; i < levels.size(); i += 2) levels[i] &= 0xbf;  // finite
    m.levels = bench.upload(levels);
    if (!scales.empty()) m.scales = reinterpret_cast<const uint16_t*>(bench.upload(scales));
    const std::vector<int32_t> tokens = {0, 36, 17}, positions = {0, 5, 99999};
    std::vector<double> frequencies;
    for (int i = 0; i < pairs; ++i) frequencies.push_back(std::pow(10000.0, -i / 8.0));
    float* x = bench.room<float>(3 * 192);
    float* angles = bench.room<float>(3 * pairs * 2);
    embed(bench.queue(), {bench.upload(tokens), bench.upload(positions), nullptr, nullptr}, 3, {m, bench.upload(frequencies), pairs, x, 192, angles});
    // The identity: each input in turn picks the weights of its column.
    std::vector<uint16_t> identity(inputs * 192);
    for (int i = 0; i < inputs; ++i) identity[i * 192 + i] = half_of_float(1.0f);
    const Product product = {m, bench.room<float>(inputs * outputs), size_t(outputs)};
    linear(bench.queue(), &product, 1, {bench.upload(identity), 192, inputs}, {});
    const std::vector<float> columns = bench.download(product.out, inputs * outputs);
    const std::vector<float> found = bench.download(x, 3 * 192);
    for (int row = 0; row < 3; ++row) {
      for (int i = 0; i < inputs; ++i)
        expect(found[row * 192 + i] == columns[i * outputs + tokens[row]], "weight " + std::to_string(i) + " of kind " + std::to_string(k) + " is the linear layer's");
    }
    const std::vector<float> turned = bench.download(angles, 3 * pairs * 2);
    for (int row = 0; row < 3; ++row) {
      for (int i = 0; i < pairs; ++i) {
        const double angle = positions[row] * frequencies[i];
        expect(std::fabs(turned[(row * pairs + i) * 2] - std::cos(angle)) < 1e-6 && std::fabs(turned[(row * pairs + i) * 2 + 1] - std::sin(angle)) < 1e-6,
               "the angle of position " + std::to_string(positions[row]) + " is right");
      }
    }
  }
});

struct StoreShape {
  int head_dim;
  int rotary;
  int bits;
  int block_tokens;
};

void check_store(const StoreShape& shape) {
  Bench bench;
  Random random(4);
  const int heads = 3, kv_heads = 2, rows = 4, dim = shape.head_dim, pairs = shape.rotary / 2;
  KvView kv;
  kv.bits = shape.bits;
  kv.layers = 2;
  kv.blocks = 5;
  kv.kv_heads = kv_heads;
  kv.block_tokens = shape.block_tokens;
  kv.head_dim = dim;
  const std::vector<uint8_t> before(kv.bytes(), 0xee);
  kv.base = bench.upload(before);
  const size_t stride = size_t(heads + 2 * kv_heads) * dim + 16;
  std::vector<float> projected = normals(random, rows * stride);
  projected[2 * stride + size_t(heads) * dim + 3] = std::numeric_limits<float>::infinity();  // a key of row 2
  std::vector<float> angles;
  for (int i = 0; i < rows * pairs; ++i) {
    angles.push_back(std::cos(0.1f * static_cast<float>(i)));
    angles.push_back(std::sin(0.1f * static_cast<float>(i)));
  }
  // Two rows that follow each other over a block's edge, one elsewhere, and one that is not there.
  const std::vector<int32_t> positions = {shape.block_tokens - 1, shape.block_tokens, 2, -1};
  const std::vector<int32_t> starts = {0, 0, 2, 0}, tables = {3, 1, 4};
  uint16_t* queries = bench.room<uint16_t>(size_t(rows) * heads * dim);
  rotate_and_store(bench.queue(), kv, 1, {nullptr, bench.upload(positions), bench.upload(starts), bench.upload(tables)}, rows,
                   {bench.upload(projected), stride, size_t(heads) * dim, size_t(heads + kv_heads) * dim, bench.upload(angles), shape.rotary, heads, queries});

  std::vector<uint8_t> wanted = before;
  std::vector<uint16_t> wanted_queries;
  for (int row = 0; row < rows; ++row) {
    for (int item = 0; item < heads + 2 * kv_heads; ++item) {
      const bool value = item >= heads + kv_heads;
      std::vector<float> x(projected.begin() + row * stride + size_t(item) * dim, projected.begin() + row * stride + size_t(item + 1) * dim);
      for (int d = 0; d < shape.rotary && !value; d += 2) {
        const float cos = angles[(row * pairs + d / 2) * 2], sin = angles[(row * pairs + d / 2) * 2 + 1];
        const float even = x[d];
        x[d] = std::fma(even, cos, x[d + 1] * -sin);
        x[d + 1] = std::fma(x[d + 1], cos, even * sin);
      }
      if (item < heads) {
        for (float element : x) wanted_queries.push_back(half_of_float(element));
        continue;
      }
      if (positions[row] < 0) continue;
      const int slot = positions[row] % shape.block_tokens;
      const int block = tables[starts[row] + positions[row] / shape.block_tokens];
      uint8_t* piece = wanted.data() + kv.piece(1, block, value, (item - heads) % kv_heads);
      if (shape.bits == 16) {
        const std::vector<uint16_t> stored = halves(x);
        std::memcpy(piece + size_t(slot) * dim * 2, stored.data(), dim * 2);
        continue;
      }
      float least = std::numeric_limits<float>::infinity(), most = -least;
      bool finite = true;
      for (float element : x) {
        least = std::min(least, element);
        most = std::max(most, element);
        finite = finite && std::isfinite(element);
      }
      const int levels = (1 << shape.bits) - 1;
      const CodeScale to = code_scale(least, most, finite, levels);
      std::memcpy(piece + shape.block_tokens * kv.token_bytes() + 2 * slot, &to.scale, 2);
      std::memcpy(piece + shape.block_tokens * kv.token_bytes() + 2 * (shape.block_tokens + slot), &to.zero, 2);
      uint8_t* codes = piece + slot * kv.token_bytes();
      std::memset(codes, 0, kv.token_bytes());
      for (int d = 0; d < dim && finite; ++d) {
        const int code = std::clamp(round_to_int((x[d] - to.offset) * to.inverse), 0, levels);
        codes[d % kv.token_bytes()] |= static_cast<uint8_t>(code << (d / kv.token_bytes() * shape.bits));
      }
    }
  }
  expect(bench.download(kv.base, kv.bytes()) == wanted, "the pool has what was to be written, and nothing else has changed");
  const std::vector<uint16_t> found = bench.download(queries, wanted_queries.size());
  for (size_t i = 0; i < found.size(); ++i) expect(found[i] == wanted_queries[i], "query element " + std::to_string(i) + " is rotated");
}

struct AddStores {
  AddStores() {
    for (const int bits : {16, 8, 4}) {
      Add("rotation and KV of " + std::to_string(bits) + " bits: bytes as the CPU's pool has them on the wire, infinite ones marked", [bits] {
        check_store({64, 64, bits, 16});
        check_store({80, 32, bits, 8});
        check_store({256, 256, bits, 16});
      });
    }
  }
} stores;

Add moves("KV that leaves and comes: layers of blocks side by side, in parts, and back; copied to other blocks, and to another pool", [] {
  Bench bench;
  Random random(5);
  for (const int bits : {16, 8, 4}) {
    KvView kv;
    kv.bits = bits;
    kv.layers = 3;
    kv.blocks = 6;
    kv.kv_heads = 2;
    kv.block_tokens = 8;
    kv.head_dim = 16;
    std::vector<uint8_t> pool(kv.bytes());
    for (uint8_t& byte : pool) byte = static_cast<uint8_t>(random());
    kv.base = bench.upload(pool);
    const std::vector<int32_t> blocks = {5, 0, 3};
    const size_t piece = kv.layer_block_bytes();
    uint8_t* packed = bench.room<uint8_t>(4 * piece);
    // Pieces 1 … 4 of layers 1 and 2: the rest of layer 1, and the first two of layer 2.
    const MoveArguments move = {bench.upload(blocks), 3, 1, 1, 4, packed};
    pack_blocks(bench.queue(), kv, move);
    const std::vector<uint8_t> found = bench.download(packed, 4 * piece);
    const auto place = [&](int i) { return pool.begin() + kv.piece(1 + (1 + i) / 3, blocks[(1 + i) % 3], 0, 0); };
    for (int i = 0; i < 4; ++i) expect(std::equal(place(i), place(i) + piece, found.begin() + i * piece), "piece " + std::to_string(i) + " is there");
    bench.clear(kv.base, kv.bytes());
    unpack_blocks(bench.queue(), kv, move);
    // All layers of block 5 to block 2 here; layers 1 and 2 of three blocks to a larger pool.
    const std::vector<int32_t> here = {5};
    copy_blocks(bench.queue(), kv, kv, {bench.upload(here), bench.upload(std::vector<int32_t>{2}), 1, 0, 3});
    KvView other = kv;
    other.blocks = 9;
    other.base = bench.room<uint8_t>(other.bytes());
    bench.clear(other.base, other.bytes());
    const std::vector<int32_t> goals = {8, 1, 4};
    copy_blocks(bench.queue(), kv, other, {move.blocks, bench.upload(goals), 3, 1, 2});
    const std::vector<uint8_t> back = bench.download(kv.base, kv.bytes());
    std::vector<uint8_t> wanted(kv.bytes());
    for (int i = 0; i < 4; ++i) std::copy(place(i), place(i) + piece, wanted.begin() + (place(i) - pool.begin()));
    for (int layer = 0; layer < 3; ++layer) std::copy_n(wanted.begin() + kv.piece(layer, 5, 0, 0), piece, wanted.begin() + kv.piece(layer, 2, 0, 0));
    expect(back == wanted, "the pool has them again, and nothing else");
    std::vector<uint8_t> copied(other.bytes());
    for (int i = 0; i < 6; ++i) {
      std::copy_n(wanted.begin() + kv.piece(1 + i / 3, blocks[i % 3], 0, 0), piece, copied.begin() + other.piece(1 + i / 3, goals[i % 3], 0, 0));
    }
    expect(bench.download(other.base, other.bytes()) == copied, "the other pool has them, and nothing else");
  }
});

}  // namespace

}  // namespace penstock::cuda::test
