// Attention over the paged pool against a plain softmax over the same rounded keys and values: every head size, KV type and kind of
// context; decode against prefill bit by bit.
#include <algorithm>
#include <cstring>
#include <limits>

#include "../../kernels/src/fixed_math.h"
#include "check.h"

namespace penstock::cuda::test {

namespace {

struct Shape {
  int head_dim;
  int heads;
  int kv_heads;
  int bits;
  int block_tokens;
};

std::string text(const Shape& s) {
  return std::to_string(s.heads) + " heads of " + std::to_string(s.head_dim) + " on " + std::to_string(s.kv_heads) + ", KV of " +
         std::to_string(s.bits) + " bits in blocks of " + std::to_string(s.block_tokens);
}

// A sequence's pool, whose blocks are out of order and, where no token is, full of NaN.
struct Sequence {
  std::vector<int32_t> table;
  std::vector<float> keys;    // [tokens, kv_heads, head_dim] as the pool has them
  std::vector<float> values;
};

class Attention {
 public:
  Attention(Bench& bench, Random& random, const Shape& shape, std::vector<int> contexts) : bench_(bench), shape_(shape) {
    view_.bits = shape.bits;
    view_.layers = 2;
    view_.kv_heads = shape.kv_heads;
    view_.block_tokens = shape.block_tokens;
    view_.head_dim = shape.head_dim;
    int blocks = 0;
    for (int context : contexts) blocks += (context + shape.block_tokens - 1) / shape.block_tokens;
    view_.blocks = blocks + 2;
    std::vector<uint8_t> pool(view_.bytes(), 0xff);
    std::vector<int32_t> order(view_.blocks);
    for (int i = 0; i < view_.blocks; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    size_t next = 0;
    for (int context : contexts) {
      Sequence sequence;
      for (int token = 0; token < context; ++token) {
        if (token % shape.block_tokens == 0) sequence.table.push_back(order[next++]);
        for (int values = 0; values < 2; ++values) {
          for (int head = 0; head < shape.kv_heads; ++head) write(random, pool, sequence, token, values, head);
        }
      }
      sequences_.push_back(std::move(sequence));
    }
    view_.base = bench.upload(pool);
  }

  // Rows of queries, all heads: what attention gives for positions of the sequences.
  struct Row {
    int sequence;
    int position;
  };

  std::vector<float> decode(const std::vector<Row>& rows, const std::vector<uint16_t>& queries, int split) {
    upload(rows, queries);
    std::vector<int32_t> indices, starts;
    int units = 0;
    const int unit = attention_unit(shape_.head_dim);
    for (size_t i = 0; i < rows.size(); ++i) {
      indices.push_back(static_cast<int32_t>(i));
      starts.push_back(units);
      units += (rows[i].position + unit) / unit;
    }
    const DecodeArguments decode = {bench_.upload(indices), bench_.upload(starts),
                                    static_cast<int>(rows.size()), split,
                                    bench_.room<float>(size_t(units) * shape_.heads * shape_.head_dim),
                                    bench_.room<float>(size_t(units) * shape_.heads * 2)};
    attend_decode(bench_.queue(), view_, 1, step_, arguments_, decode);
    return result(rows.size());
  }

  // All rows are of one sequence, in order.
  std::vector<float> prefill(const std::vector<Row>& rows, const std::vector<uint16_t>& queries) {
    upload(rows, queries);
    std::vector<PrefillTask> tasks;
    const int group = shape_.heads / shape_.kv_heads;
    for (int first = 0; first < static_cast<int>(rows.size()) * group; first += prefill_queries(shape_.head_dim))
      tasks.push_back({0, static_cast<int32_t>(rows.size()), first, 0});
    attend_prefill(bench_.queue(), view_, 1, step_, arguments_, bench_.upload(tasks), static_cast<int>(tasks.size()));
    return result(rows.size());
  }

  // Weights of halves and the sums of a unit round the result to about 2^-11.
  void expect_right(const std::vector<Row>& rows, const std::vector<uint16_t>& queries, const std::vector<float>& found) {
    const int dim = shape_.head_dim;
    const int group = shape_.heads / shape_.kv_heads;
    for (size_t row = 0; row < rows.size(); ++row) {
      const Sequence& sequence = sequences_[rows[row].sequence];
      for (int head = 0; head < shape_.heads; ++head) {
        const uint16_t* query = &queries[(row * shape_.heads + head) * dim];
        std::vector<double> weights;
        double most = -std::numeric_limits<double>::infinity();
        for (int t = 0; t <= rows[row].position; ++t) {
          double sum = 0.0;
          for (int d = 0; d < dim; ++d)
            sum += double(float_of_half(query[d])) * sequence.keys[(size_t(t) * shape_.kv_heads + head / group) * dim + d];
          weights.push_back(sum / std::sqrt(double(dim)));
          most = std::max(most, weights.back());
        }
        double total = 0.0;
        for (double& weight : weights) total += weight = std::exp(weight - most);
        for (int d = 0; d < dim; ++d) {
          double value = 0.0;
          double magnitude = 0.0;
          for (size_t t = 0; t < weights.size(); ++t) {
            const double term = weights[t] / total * sequence.values[(t * shape_.kv_heads + head / group) * dim + d];
            value += term;
            magnitude += std::fabs(term);
          }
          const float here = found[(row * shape_.heads + head) * dim + d];
          expect(std::fabs(here - value) <= 8e-4 * magnitude + 1e-6, text(shape_) + ": position " + std::to_string(rows[row].position) +
                                                                         ", head " + std::to_string(head) + ", dimension " + std::to_string(d) +
                                                                         " is " + std::to_string(value) + " and not " + std::to_string(here));
        }
      }
    }
  }

 private:
  void write(Random& random, std::vector<uint8_t>& pool, Sequence& sequence, int token, int values, int head) {
    const int dim = shape_.head_dim;
    uint8_t* piece = pool.data() + view_.piece(1, sequence.table.back(), values, head);
    const int slot = token % shape_.block_tokens;
    std::vector<float>& stored = values ? sequence.values : sequence.keys;
    if (shape_.bits == 16) {
      const std::vector<uint16_t> x = halves(normals(random, dim));
      for (int d = 0; d < dim; ++d) std::memcpy(piece + (size_t(slot) * dim + d) * 2, &x[d], 2);
      for (float value : floats(x)) stored.push_back(value);
      return;
    }
    const uint16_t scale = half_of_float(shape_.bits == 8 ? 0.02f : 0.3f);
    const uint16_t zero = half_of_float(-2.5f + 0.1f * static_cast<float>(random() % 5));
    std::memcpy(piece + shape_.block_tokens * view_.token_bytes() + 2 * slot, &scale, 2);
    std::memcpy(piece + shape_.block_tokens * view_.token_bytes() + 2 * (shape_.block_tokens + slot), &zero, 2);
    uint8_t* codes = piece + slot * view_.token_bytes();
    std::fill_n(codes, view_.token_bytes(), uint8_t{0});
    for (int d = 0; d < dim; ++d) {
      const unsigned code = random() % (1u << shape_.bits);
      if (shape_.bits == 8) {
        codes[d] = static_cast<uint8_t>(code);
      } else {
        codes[d % (dim / 2)] |= static_cast<uint8_t>(code << (d < dim / 2 ? 0 : 4));
      }
      const float value = std::fma(float_of_half(scale), static_cast<float>(code), float_of_half(zero));
      stored.push_back(float_of_half(half_of_float(value)));
    }
  }

  void upload(const std::vector<Row>& rows, const std::vector<uint16_t>& queries) {
    std::vector<int32_t> positions, starts, tables;
    std::vector<int32_t> start_of;
    for (const Sequence& sequence : sequences_) {
      start_of.push_back(static_cast<int32_t>(tables.size()));
      tables.insert(tables.end(), sequence.table.begin(), sequence.table.end());
    }
    for (const Row& row : rows) {
      positions.push_back(row.position);
      starts.push_back(start_of[row.sequence]);
    }
    step_ = {nullptr, bench_.upload(positions), bench_.upload(starts), bench_.upload(tables)};
    const size_t stride = size_t(shape_.heads) * shape_.head_dim;
    arguments_ = {bench_.upload(queries), bench_.room<uint16_t>(rows.size() * stride), stride, shape_.heads};
  }

  std::vector<float> result(size_t rows) { return floats(bench_.download(arguments_.out, rows * arguments_.out_stride)); }

  Bench& bench_;
  Shape shape_;
  KvView view_;
  std::vector<Sequence> sequences_;
  StepRows step_{};
  AttentionArguments arguments_{};
};

using Row = Attention::Row;

std::vector<uint16_t> random_queries(Random& random, const Shape& shape, size_t rows) {
  return halves(normals(random, rows * shape.heads * shape.head_dim));
}

void check_decode(const Shape& shape, const std::vector<int>& contexts) {
  Bench bench(static_cast<uint32_t>(shape.head_dim));
  Random random(static_cast<uint32_t>(shape.head_dim + shape.bits));
  Attention attention(bench, random, shape, contexts);
  std::vector<Row> rows;
  for (size_t i = 0; i < contexts.size(); ++i) rows.push_back({static_cast<int>(i), contexts[i] - 1});
  const std::vector<uint16_t> queries = random_queries(random, shape, rows.size());
  const std::vector<float> found = attention.decode(rows, queries, 1);
  attention.expect_right(rows, queries, found);
  expect(attention.decode(rows, queries, 3) == found, text(shape) + ": the same bits in three blocks");
}

void check_prefill(const Shape& shape, int before, int rows_of_chunk) {
  Bench bench(3);
  Random random(static_cast<uint32_t>(shape.head_dim + 7 * shape.bits));
  Attention attention(bench, random, shape, {before + rows_of_chunk});
  std::vector<Row> rows;
  for (int i = 0; i < rows_of_chunk; ++i) rows.push_back({0, before + i});
  const std::vector<uint16_t> queries = random_queries(random, shape, rows.size());
  const std::vector<float> found = attention.prefill(rows, queries);
  attention.expect_right(rows, queries, found);
  expect(attention.decode(rows, queries, 2) == found, text(shape) + ": the same bits row by row");
  // The later half as a chunk of its own.
  const int half = rows_of_chunk / 2;
  if (half == 0) return;
  const std::vector<Row> later(rows.begin() + half, rows.end());
  const size_t width = size_t(shape.heads) * shape.head_dim;
  const std::vector<float> again = attention.prefill(later, std::vector<uint16_t>(queries.begin() + half * width, queries.end()));
  expect(std::equal(again.begin(), again.end(), found.begin() + half * width), text(shape) + ": the same bits in another chunk");
}

struct AddShapes {
  AddShapes() {
    for (const int head_dim : {16, 64, 80, 96, 128, 256}) {
      for (const int bits : {16, 8, 4}) {
        const Shape shape = {head_dim, 6, 2, bits, head_dim == 96 ? 8 : 16};
        Add("attention, " + text(shape) + ": one token, partial blocks and several units", [shape] { check_decode(shape, {1, 5, 130, 300}); });
        Add("attention, " + text(shape) + ": a chunk behind a prefix, and the same bits row by row", [shape] { check_prefill(shape, 117, 26); });
      }
    }
    Add("attention: a long context", [] { check_decode({64, 3, 1, 16, 16}, {2100}); });
    Add("attention: a chunk of one token at position 0, and one of a block and a half", [] {
      check_prefill({64, 3, 1, 16, 16}, 0, 1);
      check_prefill({64, 3, 3, 16, 16}, 0, 24);
    });
    Add("attention: more heads to a KV head than an mma has rows", [] {
      check_decode({64, 20, 1, 16, 16}, {40, 129});
      check_prefill({64, 20, 1, 16, 16}, 120, 10);
    });
  }
} shapes;

}  // namespace

}  // namespace penstock::cuda::test
