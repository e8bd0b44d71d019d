// Linear layers of every kind of weight against a plain loop over the same halves, and few rows against many, bit by bit.
#include "../../kernels/src/cuda/packed_weights.h"
#include "../../kernels/src/fixed_math.h"
#include "check.h"

namespace penstock::cuda::test {

namespace {

constexpr WeightKind kKinds[] = {WeightKind::Half,   WeightKind::Byte,         WeightKind::ByteHalf,  WeightKind::ByteOffset,
                                 WeightKind::Nibble, WeightKind::NibbleOffset, WeightKind::NibbleZero};
const char* const kKindNames[] = {"halves",       "Q8_0 and Q5_0", "Q6_K",           "Q5_1 and Q5_K", "Q4_0",
                                  "Q4_1 and Q4_K", "AWQ in groups of 128"};

struct Weights {
  DeviceMatrix matrix;         // of the device
  std::vector<float> exact;    // [outputs, inputs] what the levels mean, rounded to halves
};

uint16_t half_between(Random& random, float least, float most) {
  return half_of_float(std::uniform_real_distribution<float>(least, most)(random));
}

Weights make(Bench& bench, Random& random, WeightKind kind, int outputs, int inputs) {
  Weights weights;
  DeviceMatrix& m = weights.matrix;
  m.kind = kind;
  m.outputs = outputs;
  m.inputs = inputs;
  m.panels = (outputs + 15) / 16;
  m.chunks = (inputs + 63) / 64;
  std::vector<uint8_t> levels(m.level_bytes()), scales(m.scale_bytes());
  weights.exact.resize(size_t(outputs) * inputs);
  const size_t panel_levels = panel_level_bytes(m);
  const size_t panel_scales = panel_scale_bytes(m);
  for (int output = 0; output < outputs; ++output) {
    const int panel = output / 16;
    PanelWriter writer(m, levels.data() + panel * panel_levels, scales.data() + panel * panel_scales);
    uint16_t scale = 0;
    uint16_t second = 0;
    for (int input = 0; input < inputs; ++input) {
      if (input % group_inputs(kind) == 0) {
        scale = half_between(random, 0.004f, 0.03f);
        second = kind == WeightKind::NibbleZero ? half_of_float(static_cast<float>(random() % 16)) : half_between(random, -0.2f, 0.2f);
        if (kind != WeightKind::Half) writer.put_numbers(output % 16, input / group_inputs(kind), scale, second);
      }
      unsigned level = random() % (1u << std::min(8, level_bits(kind)));
      const float s = float_of_half(scale);
      const float x = float_of_half(second);
      float value = 0.0f;
      switch (kind) {
        case WeightKind::Half:
          level = half_between(random, -1.0f, 1.0f);
          value = float_of_half(static_cast<uint16_t>(level));
          break;
        case WeightKind::Byte:
        case WeightKind::ByteHalf: value = (static_cast<float>(level) - 128.0f) * s; break;
        case WeightKind::ByteOffset: value = std::fma(static_cast<float>(level) - 128.0f, s, x); break;
        case WeightKind::Nibble: value = (static_cast<float>(level) - 8.0f) * s; break;
        case WeightKind::NibbleOffset: value = std::fma(static_cast<float>(level), s, x); break;
        case WeightKind::NibbleZero: value = (static_cast<float>(level) - x) * s; break;
      }
      writer.put_level(output % 16, input, level);
      weights.exact[size_t(output) * inputs + input] = float_of_half(half_of_float(value));
    }
  }
  m.levels = bench.upload(levels);
  m.scales = scales.empty() ? nullptr : reinterpret_cast<const uint16_t*>(bench.upload(scales));
  return weights;
}

using Multiply = std::function<void(const Queue&, const Product*, int, const LinearInput&)>;

// With room for partial sums, or without.
Multiply with_partials(Bench& bench, decltype(&linear) how, size_t bytes = 1 << 22) {
  const Partials partials = {bytes == 0 ? nullptr : bench.room<uint8_t>(bytes), bytes};
  return [=](const Queue& queue, const Product* products, int count, const LinearInput& input) { how(queue, products, count, input, partials); };
}

// [rows, outputs] of each of the matrices.
std::vector<std::vector<float>> multiply(Bench& bench, const Multiply& how, const std::vector<Weights>& weights, const std::vector<uint16_t>& x,
                                         int rows, int inputs) {
  const size_t stride = weights[0].matrix.input_stride();
  std::vector<uint16_t> padded(rows * stride);
  for (int row = 0; row < rows; ++row) std::copy_n(x.begin() + row * inputs, inputs, padded.begin() + row * stride);
  const uint16_t* input = bench.upload(padded);
  std::vector<Product> products;
  for (const Weights& w : weights) products.push_back({w.matrix, bench.room<float>(size_t(rows) * w.matrix.outputs), size_t(w.matrix.outputs)});
  how(bench.queue(), products.data(), static_cast<int>(products.size()), {input, stride, rows});
  std::vector<std::vector<float>> out;
  for (const Product& product : products) out.push_back(bench.download(product.out, size_t(rows) * product.stride));
  return out;
}

// The error of a sum in floats is bounded by the sum of magnitudes; tensor cores may cut where they could round.
void expect_close(const std::vector<float>& found, const Weights& weights, const std::vector<uint16_t>& x, int rows, int inputs) {
  const int outputs = weights.matrix.outputs;
  for (int row = 0; row < rows; ++row) {
    for (int output = 0; output < outputs; ++output) {
      double sum = 0.0;
      double magnitude = 0.0;
      for (int k = 0; k < inputs; ++k) {
        const double term = double(weights.exact[size_t(output) * inputs + k]) * float_of_half(x[size_t(row) * inputs + k]);
        sum += term;
        magnitude += std::fabs(term);
      }
      const float value = found[size_t(row) * outputs + output];
      expect(std::fabs(value - sum) <= 2e-6 * magnitude + 1e-30,
             "row " + std::to_string(row) + ", output " + std::to_string(output) + " is " + std::to_string(sum) + " and not " + std::to_string(value));
    }
  }
}

void check_kind(WeightKind kind) {
  Bench bench;
  Random random(static_cast<uint32_t>(kind) + 1);
  for (const auto& [outputs, inputs] : {std::pair{32, 64}, {16, 32}, {40, 1216}, {200, 320}}) {
    if (kind == WeightKind::Half && inputs == 320) continue;
    for (const int rows : {1, 9, 20, 70}) {
      if (rows == 70 && outputs == 40) continue;
      const std::vector<Weights> weights = {make(bench, random, kind, outputs, inputs)};
      const std::vector<uint16_t> x = halves(normals(random, size_t(rows) * inputs));
      const auto many = multiply(bench, with_partials(bench, linear_many, 0), weights, x, rows, inputs);
      expect_close(many[0], weights[0], x, rows, inputs);
      expect(multiply(bench, with_partials(bench, linear_many), weights, x, rows, inputs) == many, "slices that blocks share give the same bits");
      if (rows <= 16) expect(multiply(bench, linear_few, weights, x, rows, inputs) == many, "few rows and many give the same bits");
    }
  }
}

struct AddKinds {
  AddKinds() {
    for (int i = 0; i < kWeightKinds; ++i)
      Add(std::string("linear layers, ") + kKindNames[i] + ": few rows and many give the plain sum, and the same bits", [i] { check_kind(kKinds[i]); });
  }
} kinds;

Add rows_alone("linear layers: a row's bits do not depend on the rows beside it", [] {
  Bench bench(7);
  Random random(5);
  const int inputs = 2100;  // more than four slices, the last a part of one
  const std::vector<Weights> weights = {make(bench, random, WeightKind::NibbleOffset, 48, inputs)};
  const std::vector<uint16_t> x = halves(normals(random, 67 * inputs));
  const auto all = multiply(bench, with_partials(bench, linear), weights, x, 67, inputs)[0];
  for (const int row : {0, 8, 66}) {
    const std::vector<uint16_t> alone(x.begin() + row * inputs, x.begin() + (row + 1) * inputs);
    const auto one = multiply(bench, with_partials(bench, linear), weights, alone, 1, inputs)[0];
    expect(std::equal(one.begin(), one.end(), all.begin() + row * 48), "row " + std::to_string(row) + " alone has the same bits");
  }
});

Add together("linear layers: three matrices of two kinds share one input", [] {
  Bench bench;
  Random random(6);
  for (const int rows : {2, 20}) {
    const std::vector<Weights> weights = {make(bench, random, WeightKind::Nibble, 64, 128), make(bench, random, WeightKind::Nibble, 24, 128),
                                          make(bench, random, WeightKind::ByteHalf, 24, 128)};
    const std::vector<uint16_t> x = halves(normals(random, rows * 128));
    const auto found = multiply(bench, with_partials(bench, linear), weights, x, rows, 128);
    for (int i = 0; i < 3; ++i) expect_close(found[i], weights[i], x, rows, 128);
  }
});

Add awq("linear layers: AWQ's words become what (level - zero) * scale says", [] {
  Bench bench;
  Random random(8);
  const int outputs = 24, inputs = 384, rows = 3;
  std::vector<uint32_t> levels(inputs * outputs / 8), zeros(inputs / 128 * outputs / 8);
  for (uint32_t& word : levels) word = random();
  for (uint32_t& word : zeros) word = random();
  std::vector<uint16_t> scales(inputs / 128 * outputs);
  for (uint16_t& scale : scales) scale = half_between(random, 0.004f, 0.03f);
  const AwqMatrix from = {outputs, inputs, levels.data(), zeros.data(), scales.data()};
  Weights weights;
  weights.matrix = describe_for_device(from);
  std::vector<uint8_t> packed(weights.matrix.level_bytes()), numbers(weights.matrix.scale_bytes());
  for (int panel = 0; panel < weights.matrix.panels; ++panel)
    repack_panel(from, panel, weights.matrix, packed.data() + panel * panel_level_bytes(weights.matrix), numbers.data() + panel * panel_scale_bytes(weights.matrix));
  weights.matrix.levels = bench.upload(packed);
  weights.matrix.scales = reinterpret_cast<const uint16_t*>(bench.upload(numbers));
  // The order of AutoAWQ: eight outputs of a word are nibbles 0, 4, 1, 5, 2, 6, 3, 7.
  const int order[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  for (int output = 0; output < outputs; ++output) {
    for (int k = 0; k < inputs; ++k) {
      const auto nibble = [&](const std::vector<uint32_t>& words, int row) {
        return static_cast<float>(words[row * outputs / 8 + output / 8] >> 4 * order[output % 8] & 15u);
      };
      const float value = (nibble(levels, k) - nibble(zeros, k / 128)) * float_of_half(scales[k / 128 * outputs + output]);
      weights.exact.push_back(float_of_half(half_of_float(value)));
    }
  }
  const std::vector<uint16_t> x = halves(normals(random, rows * inputs));
  expect_close(multiply(bench, with_partials(bench, linear), {weights}, x, rows, inputs)[0], weights, x, rows, inputs);
});

}  // namespace

}  // namespace penstock::cuda::test
