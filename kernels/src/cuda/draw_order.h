// What the device is to draw for a row of logits, and what came of it. For the host and for kernels.
#pragma once

#include <cstdint>

namespace penstock::cuda {

struct DrawOrder {
  uint64_t seed;
  uint64_t position;
  uint32_t choice;
  float temperature;  // below kGreedyBelow: the most likely token
  int32_t top_k;
  float top_p;
  float min_p;
  int32_t row;     // of the logits
  int32_t wanted;  // 0: only look whether all logits are finite
};

constexpr int kMostCandidates = 1024;
constexpr float kGreedyBelow = 1e-6f;

// Instead of a token.
constexpr int32_t kNotDrawn = -1;
constexpr int32_t kNotFinite = -2;
constexpr int32_t kTooMany = -3;  // more candidates than kMostCandidates have to be looked at: the host's sampler does

}  // namespace penstock::cuda
