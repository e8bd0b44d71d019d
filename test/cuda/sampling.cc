// Drawing on the device against the host's sampler: the same token, for every way of choosing, and honesty where it cannot tell.
#include <limits>

#include "../../kernels/src/cuda/draw_order.h"
#include "../../kernels/src/sampler.h"
#include "check.h"

namespace penstock::cuda::test {

namespace {

DrawOrder order_of(const SamplerOptions& o, uint64_t position, int row) {
  return {o.seed, position, o.choice, o.temperature, o.top_k, o.top_p, o.min_p, row, 1};
}

struct Outcome {
  int same = 0;
  int too_many = 0;
};

// Rows of logits of the same shape, a draw each.
Outcome compare(Bench& bench, Random& random, int vocabulary, float spread, const std::vector<SamplerOptions>& all, bool ties = false) {
  const size_t stride = vocabulary + 5;
  std::vector<float> logits = normals(random, all.size() * stride, spread);
  if (ties) {
    for (float& logit : logits) logit = std::round(logit);
  }
  std::vector<DrawOrder> orders;
  for (size_t i = 0; i < all.size(); ++i) orders.push_back(order_of(all[i], 3 + i, static_cast<int>(i)));
  int32_t* tokens = bench.room<int32_t>(all.size());
  draw_tokens(bench.queue(), bench.upload(logits), stride, vocabulary, bench.upload(orders), static_cast<int>(all.size()), tokens);
  const std::vector<int32_t> found = bench.download(tokens, all.size());
  Outcome outcome;
  SamplerScratch scratch;
  for (size_t i = 0; i < all.size(); ++i) {
    const std::vector<int32_t> prompt(3 + i, 1);
    Sampler sampler(all[i], vocabulary, prompt.data(), prompt.size(), nullptr, 0);
    const int32_t wanted = sampler.draw(&logits[i * stride], vocabulary, scratch);
    if (found[i] == kTooMany) {
      ++outcome.too_many;
    } else {
      expect(found[i] == wanted, "row " + std::to_string(i) + " of " + std::to_string(vocabulary) + " draws " + std::to_string(wanted) + " and not " + std::to_string(found[i]));
      ++outcome.same;
    }
  }
  return outcome;
}

std::vector<SamplerOptions> many(const SamplerOptions& options, int count) {
  std::vector<SamplerOptions> all;
  for (int i = 0; i < count; ++i) {
    all.push_back(options);
    all.back().seed = 1000003u * static_cast<uint64_t>(i) + (uint64_t{1} << 40);
    all.back().choice = static_cast<uint32_t>(i % 3);
  }
  return all;
}

struct Way {
  const char* name;
  SamplerOptions options;
};

SamplerOptions options(float temperature, int top_k, float top_p, float min_p) {
  SamplerOptions o;
  o.temperature = temperature;
  o.top_k = top_k;
  o.top_p = top_p;
  o.min_p = min_p;
  return o;
}

struct AddWays {
  AddWays() {
    const std::vector<Way> ways = {{"the likeliest", options(0.0f, 0, 1.0f, 0.0f)},
                                   {"from all", options(1.0f, 0, 1.0f, 0.0f)},
                                   {"from all, hot and cold", options(0.3f, 0, 1.0f, 0.0f)},
                                   {"top-k", options(0.8f, 40, 1.0f, 0.0f)},
                                   {"top-k of one", options(0.8f, 1, 1.0f, 0.0f)},
                                   {"top-k and top-p", options(1.2f, 100, 0.9f, 0.0f)},
                                   {"top-p", options(0.7f, 0, 0.9f, 0.0f)},
                                   {"min-p", options(1.0f, 0, 1.0f, 0.05f)},
                                   {"top-p and min-p", options(1.0f, 0, 0.95f, 0.02f)},
                                   {"top-k, top-p and min-p", options(0.9f, 50, 0.8f, 0.1f)}};
    for (const Way& way : ways) {
      Add(std::string("drawing on the device, ") + way.name + ": the host's sampler's tokens", [way] {
        Bench bench;
        Random random(9);
        for (const int vocabulary : {300, 1024, 5000}) {
          const Outcome outcome = compare(bench, random, vocabulary, 4.0f, many(way.options, 12));
          expect(outcome.same >= 10, "nearly all are drawn on the device; " + std::to_string(outcome.same) + " of 12 were");
          compare(bench, random, vocabulary, 2.0f, many(way.options, 4), true);
        }
      });
    }
  }
} ways;

Add flat("drawing on the device: where more than its candidates may be drawn it says so", [] {
  Bench bench;
  Random random(10);
  expect(compare(bench, random, 6000, 0.01f, many(options(1.0f, 0, 0.9f, 0.0f), 3)).too_many == 3, "a flat nucleus is too large");
  expect(compare(bench, random, 6000, 0.01f, many(options(1.0f, 0, 1.0f, 0.5f), 3)).too_many == 3, "and so are all above min-p");
  expect(compare(bench, random, 6000, 1.0f, many(options(1.0f, 2000, 1.0f, 0.0f), 3)).too_many == 3, "and a top-k of 2,000");
});

Add damaged("drawing on the device: logits that are not finite are reported, also where nothing is drawn", [] {
  Bench bench;
  Random random(11);
  std::vector<float> logits = normals(random, 3 * 700);
  logits[5] = std::numeric_limits<float>::quiet_NaN();
  logits[700 + 699] = -std::numeric_limits<float>::infinity();
  std::vector<DrawOrder> orders(3);
  orders[0] = order_of(options(0.0f, 0, 1.0f, 0.0f), 1, 0);
  orders[1].row = 1;
  orders[2].row = 2;
  int32_t* tokens = bench.room<int32_t>(3);
  draw_tokens(bench.queue(), bench.upload(logits), 700, 700, bench.upload(orders), 3, tokens);
  expect(bench.download(tokens, 3) == std::vector<int32_t>({kNotFinite, kNotFinite, kNotDrawn}), "two rows are damaged and one is not");
});

}  // namespace

}  // namespace penstock::cuda::test
