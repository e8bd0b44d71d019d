#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "fixed_math.h"
#include "philox.h"

namespace penstock {

namespace {

constexpr int32_t kBlock = 1024;  // ids whose weights are summed in floats; the sums of blocks are added in doubles
constexpr int32_t kLanes = 16;
// Below this the division by the temperature could leave the range of floats; the draw would be the most likely token.
constexpr float kGreedyBelow = 1e-6f;

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error("sampler: " + message); }

// -- Loops over a vocabulary -----------------------------------------------------------------------------------------
//
// These are the only loops that touch every logit. Each is compiled twice, for the baseline and for AVX2 with FMA; both
// run the same IEEE operations lane by lane, so both give the same bits.

#define PENSTOCK_INLINE inline __attribute__((always_inline))

struct Peak {
  float greatest;
  bool finite;  // every element is
};

PENSTOCK_INLINE Peak peak_body(const float* x, int32_t n) {
  float greatest[kLanes];
  uint32_t magnitude[kLanes];
  for (int lane = 0; lane < kLanes; lane++) greatest[lane] = -std::numeric_limits<float>::infinity();
  for (int lane = 0; lane < kLanes; lane++) magnitude[lane] = 0;
  int32_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; lane++) {
      const float value = x[i + lane];
      uint32_t bits;
      __builtin_memcpy(&bits, &value, sizeof bits);
      bits &= 0x7fffffffu;
      greatest[lane] = value > greatest[lane] ? value : greatest[lane];
      magnitude[lane] = bits > magnitude[lane] ? bits : magnitude[lane];
    }
  }
  for (; i < n; i++) {
    greatest[0] = x[i] > greatest[0] ? x[i] : greatest[0];
    magnitude[0] = std::max(magnitude[0], bits_of(x[i]) & 0x7fffffffu);
  }
  for (int lane = 1; lane < kLanes; lane++) {
    greatest[0] = greatest[lane] > greatest[0] ? greatest[lane] : greatest[0];
    magnitude[0] = std::max(magnitude[0], magnitude[lane]);
  }
  return {greatest[0], magnitude[0] < 0x7f800000u};
}

// fixed_exp for x <= 0, step by step, without its branches: they would keep the loop below from running in lanes. Far
// below zero the steps give nonsense, which the mask clears.
PENSTOCK_INLINE float exp_not_positive(float x) {
  using C = ExpConstants;
  const float shifted = __builtin_fmaf(x, C::log2e, kRoundingShift);
  const float n = shifted - kRoundingShift;
  float r = __builtin_fmaf(-n, C::ln2_high, x);
  r = __builtin_fmaf(-n, C::ln2_low, r);
  float p = C::p5;
  p = __builtin_fmaf(p, r, C::p4);
  p = __builtin_fmaf(p, r, C::p3);
  p = __builtin_fmaf(p, r, C::p2);
  p = __builtin_fmaf(p, r, C::p1);
  p = __builtin_fmaf(p, r, C::p0);
  p = __builtin_fmaf(p, r, 1.0f);
  p = __builtin_fmaf(p, r, 1.0f);
  uint32_t bits, scale, zero;
  const float shift = kRoundingShift;
  __builtin_memcpy(&bits, &p, sizeof bits);
  __builtin_memcpy(&scale, &shifted, sizeof scale);
  __builtin_memcpy(&zero, &shift, sizeof zero);
  bits += (scale - zero) << 23;
  bits &= 0u - static_cast<uint32_t>(x >= C::lowest);
  float out;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}

// weights[i] = exp((x[i] - greatest) / temperature), and the sum of each block; returns the sum of all.
PENSTOCK_INLINE double weigh_body(const float* x, int32_t n, float greatest, float temperature, float* weights,
                                  double* block_sums) {
  float unkept[kBlock];
  double total = 0.0;
  for (int32_t start = 0; start < n; start += kBlock) {
    const int32_t count = n - start < kBlock ? n - start : kBlock;
    float* w = weights != nullptr ? weights + start : unkept;
    for (int32_t i = 0; i < count; i++) w[i] = exp_not_positive((x[start + i] - greatest) / temperature);
    float lanes[kLanes] = {0};
    int32_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (int lane = 0; lane < kLanes; lane++) lanes[lane] += w[i + lane];
    }
    for (; i < count; i++) lanes[i % kLanes] += w[i];
    const double sum = tree_sum16(lanes);
    if (block_sums != nullptr) block_sums[start / kBlock] = sum;
    total += sum;
  }
  return total;
}

Peak peak_baseline(const float* x, int32_t n) { return peak_body(x, n); }
double weigh_baseline(const float* x, int32_t n, float greatest, float temperature, float* weights, double* block_sums) {
  return weigh_body(x, n, greatest, temperature, weights, block_sums);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) Peak peak_avx2(const float* x, int32_t n) { return peak_body(x, n); }
__attribute__((target("avx2,fma"))) double weigh_avx2(const float* x, int32_t n, float greatest, float temperature,
                                                      float* weights, double* block_sums) {
  return weigh_body(x, n, greatest, temperature, weights, block_sums);
}
const bool kAvx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
const auto peak_of = kAvx2 ? peak_avx2 : peak_baseline;
const auto weigh = kAvx2 ? weigh_avx2 : weigh_baseline;
#else
const auto peak_of = peak_baseline;
const auto weigh = weigh_baseline;
#endif

// The greatest element, all of which must be finite.
float checked_peak(const float* logits, int32_t vocab) {
  const Peak peak = peak_of(logits, vocab);
  if (peak.finite) return peak.greatest;
  int32_t at = 0;
  while (std::isfinite(logits[at])) at++;
  fail("the logit of token " + std::to_string(at) + " is not finite");
}

int32_t first_of(const float* logits, int32_t vocab, float value) {
  for (int32_t i = 0; i < vocab; i++) {
    if (logits[i] == value) return i;
  }
  fail("no token has the greatest logit");
}

// -- Candidates --------------------------------------------------------------------------------------------------------

bool before(const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

// The k first candidates in order. A heap keeps its worst on top, so that almost every token costs one comparison.
void select_top(const float* logits, int32_t vocab, int32_t k, std::vector<Candidate>& out) {
  out.clear();
  for (int32_t id = 0; id < k; id++) out.push_back({logits[id], 0.0f, id});
  std::make_heap(out.begin(), out.end(), before);
  for (int32_t id = k; id < vocab; id++) {
    // Later ids lose ties, so only a greater logit enters.
    if (logits[id] > out.front().logit) {
      std::pop_heap(out.begin(), out.end(), before);
      out.back() = {logits[id], 0.0f, id};
      std::push_heap(out.begin(), out.end(), before);
    }
  }
  std::sort_heap(out.begin(), out.end(), before);
}

// The length of the shortest prefix whose weights add up to `wanted`, or of the longest with weights above zero.
size_t prefix_reaching(const std::vector<Candidate>& candidates, double wanted) {
  double sum = 0.0;
  for (size_t i = 0; i < candidates.size(); i++) {
    if (candidates[i].weight == 0.0f) return i;
    sum += candidates[i].weight;
    if (sum >= wanted) return i + 1;
  }
  return candidates.size();
}

// The nucleus of the whole vocabulary, in order. Only as much of it is sorted as turns out to be needed: tokens enter in
// slices of their logit, each slice below all of those before.
void select_nucleus(const float* logits, int32_t vocab, float greatest, float temperature, double wanted,
                    const std::vector<float>& weights, std::vector<Candidate>& out) {
  constexpr float none = -std::numeric_limits<float>::infinity();
  out.clear();
  double sum = 0.0;
  float above = std::numeric_limits<float>::infinity();
  for (const float margin : {4.0f, 8.0f, 12.0f, 90.0f}) {
    // Weights are zero from 87.3 on, so the last slice has everything that counts.
    const float floor = std::max(greatest - margin * temperature, std::numeric_limits<float>::lowest());
    const size_t start = out.size();
    for (int32_t id = 0; id < vocab; id++) {
      if (logits[id] >= floor && logits[id] < above && logits[id] != none) out.push_back({logits[id], weights[id], id});
    }
    std::sort(out.begin() + static_cast<std::ptrdiff_t>(start), out.end(), before);
    for (size_t i = start; i < out.size(); i++) {
      sum += out[i].weight;
      if (sum >= wanted) {
        out.resize(i + 1);
        return;
      }
    }
    above = floor;
  }
}

void check_token(int32_t token, int32_t vocabulary, const char* where) {
  if (token < 0 || token >= vocabulary) {
    fail(std::string(where) + ": token " + std::to_string(token) + " is not in 0 ... " + std::to_string(vocabulary - 1));
  }
}

void check_range(const char* name, float value, bool inside, const char* expected) {
  if (!inside) fail(std::string(name) + ": expected " + expected + ", found " + std::to_string(value));
}

}  // namespace

Sampler::Sampler(SamplerOptions options, int32_t vocabulary, const int32_t* prompt, size_t prompt_length,
                 const int32_t* output, size_t output_length)
    : options_(std::move(options)), vocabulary_(vocabulary), prompt_length_(prompt_length), output_length_(output_length) {
  const SamplerOptions& o = options_;
  check_range("temperature", o.temperature, o.temperature >= 0.0f && std::isfinite(o.temperature), "a finite number from 0");
  check_range("topK", static_cast<float>(o.top_k), o.top_k >= 0, "an integer from 0");
  check_range("topP", o.top_p, o.top_p > 0.0f && o.top_p <= 1.0f, "a number above 0 and at most 1");
  check_range("minP", o.min_p, o.min_p >= 0.0f && o.min_p <= 1.0f, "a number in 0 ... 1");
  check_range("repetitionPenalty", o.repetition_penalty, o.repetition_penalty > 0.0f && std::isfinite(o.repetition_penalty),
              "a finite number above 0");
  check_range("presencePenalty", o.presence_penalty, std::isfinite(o.presence_penalty), "a finite number");
  check_range("frequencyPenalty", o.frequency_penalty, std::isfinite(o.frequency_penalty), "a finite number");
  check_range("minTokens", static_cast<float>(o.min_tokens), o.min_tokens >= 0, "an integer from 0");
  for (const auto& [token, bias] : o.logit_bias) {
    check_token(token, vocabulary, "logitBias");
    check_range("logitBias", bias, std::isfinite(bias), "a finite number");
  }
  for (const int32_t token : o.suppressed_tokens) check_token(token, vocabulary, "suppressedTokens");
  for (size_t i = 0; i < prompt_length; i++) check_token(prompt[i], vocabulary, "prompt");
  for (size_t i = 0; i < output_length; i++) check_token(output[i], vocabulary, "output");

  counting_ = o.repetition_penalty != 1.0f || o.presence_penalty != 0.0f || o.frequency_penalty != 0.0f;
  if (!counting_) return;
  if (o.repetition_penalty != 1.0f) {
    for (size_t i = 0; i < prompt_length; i++) seen_.emplace(prompt[i], 0);
  }
  for (size_t i = 0; i < output_length; i++) seen_[output[i]]++;
}

void Sampler::append(int32_t token) {
  check_token(token, vocabulary_, "append");
  if (counting_) seen_[token]++;
  output_length_++;
}

bool Sampler::suppresses() const {
  return output_length_ < static_cast<size_t>(options_.min_tokens) && !options_.suppressed_tokens.empty();
}

bool Sampler::adjusts() const { return !options_.logit_bias.empty() || !seen_.empty() || suppresses(); }

// The logits after bias, penalties and suppression; the raw ones where nothing changes them.
const float* Sampler::adjust(const float* logits, SamplerScratch& scratch) const {
  if (!adjusts()) return logits;
  const SamplerOptions& o = options_;

  scratch.logits.assign(logits, logits + vocabulary_);
  float* adjusted = scratch.logits.data();
  const auto bounded = [](float value) {
    constexpr float most = std::numeric_limits<float>::max();
    return value > most ? most : (value < -most ? -most : value);
  };
  for (const auto& [token, bias] : o.logit_bias) adjusted[token] = bounded(adjusted[token] + bias);
  // The order of the map does not matter: each token changes on its own.
  for (const auto& [token, count] : seen_) {
    float value = adjusted[token];
    value = bounded(value > 0.0f ? value / o.repetition_penalty : value * o.repetition_penalty);
    if (count > 0) value = bounded(value - (o.presence_penalty + o.frequency_penalty * static_cast<float>(count)));
    adjusted[token] = value;
  }
  if (suppresses()) {
    for (const int32_t token : o.suppressed_tokens) adjusted[token] = -std::numeric_limits<float>::infinity();
  }
  return adjusted;
}

// In [0, 1), 53 bits.
double Sampler::uniform() const {
  const uint64_t at = position();
  const uint32_t counter[4] = {static_cast<uint32_t>(at), static_cast<uint32_t>(at >> 32), options_.choice, 0};
  const uint32_t key[2] = {static_cast<uint32_t>(options_.seed), static_cast<uint32_t>(options_.seed >> 32)};
  const Philox random = philox4x32_10(counter, key);
  return (static_cast<double>(random.word[0] >> 5) * 67108864.0 + static_cast<double>(random.word[1] >> 6)) / 9007199254740992.0;
}

// One token of the softmax over the whole vocabulary. The weights and their block sums are in the scratch.
int32_t Sampler::draw_from_all(double total, const SamplerScratch& scratch) const {
  const double target = uniform() * total;
  const int32_t blocks = (vocabulary_ + kBlock - 1) / kBlock;
  double sum = 0.0;
  int32_t block = -1;
  double start = 0.0;  // sum of the blocks before `block`
  for (int32_t b = 0; b < blocks; b++) {
    if (scratch.block_sums[b] == 0.0) continue;
    block = b;
    start = sum;
    sum += scratch.block_sums[b];
    if (sum > target) break;
  }
  // Rounding may leave the target just beyond the weights of its block; then it is the last of them that has any.
  int32_t token = -1;
  sum = start;
  for (int32_t id = block * kBlock; id < std::min(vocabulary_, (block + 1) * kBlock); id++) {
    if (scratch.weights[id] == 0.0f) continue;
    token = id;
    sum += scratch.weights[id];
    if (sum > target) break;
  }
  return token;
}

int32_t Sampler::draw_from_some(const float* logits, float greatest, SamplerScratch& scratch) const {
  const SamplerOptions& o = options_;
  std::vector<Candidate>& candidates = scratch.candidates;
  candidates.reserve(static_cast<size_t>(vocabulary_));
  if (o.top_k > 0 && o.top_k < vocabulary_) {
    select_top(logits, vocabulary_, o.top_k, candidates);
    double total = 0.0;
    for (Candidate& candidate : candidates) {
      candidate.weight = exp_not_positive((candidate.logit - greatest) / o.temperature);
      total += candidate.weight;
    }
    candidates.resize(prefix_reaching(candidates, o.top_p < 1.0f ? o.top_p * total : std::numeric_limits<double>::infinity()));
  } else {
    scratch.weights.resize(static_cast<size_t>(vocabulary_));
    const double total = weigh(logits, vocabulary_, greatest, o.temperature, scratch.weights.data(), nullptr);
    if (o.top_p < 1.0f) {
      select_nucleus(logits, vocabulary_, greatest, o.temperature, o.top_p * total, scratch.weights, candidates);
    } else {
      candidates.clear();
      for (int32_t id = 0; id < vocabulary_; id++) {
        if (scratch.weights[id] >= o.min_p) candidates.push_back({logits[id], scratch.weights[id], id});
      }
      std::sort(candidates.begin(), candidates.end(), before);
    }
  }
  // The first has weight 1, so min-p never empties the set.
  size_t kept = 1;
  double total = candidates[0].weight;
  while (kept < candidates.size() && candidates[kept].weight >= o.min_p) total += candidates[kept++].weight;

  const double target = uniform() * total;
  double sum = 0.0;
  for (size_t i = 0; i + 1 < kept; i++) {
    sum += candidates[i].weight;
    if (sum > target) return candidates[i].id;
  }
  return candidates[kept - 1].id;
}

int32_t Sampler::draw(const float* logits, int32_t vocab, SamplerScratch& scratch) {
  if (vocab != vocabulary_) fail("expected " + std::to_string(vocabulary_) + " logits, found " + std::to_string(vocab));
  const SamplerOptions& o = options_;
  float greatest = checked_peak(logits, vocab);
  const float* adjusted = adjust(logits, scratch);
  if (adjusted != logits) greatest = peak_of(adjusted, vocab).greatest;
  if (greatest == -std::numeric_limits<float>::infinity()) fail("every token of the vocabulary is suppressed");

  int32_t token;
  if (o.temperature < kGreedyBelow) {
    token = first_of(adjusted, vocab, greatest);
  } else if ((o.top_k == 0 || o.top_k >= vocab) && o.top_p >= 1.0f && o.min_p <= 0.0f) {
    scratch.weights.resize(static_cast<size_t>(vocab));
    scratch.block_sums.resize(static_cast<size_t>((vocab + kBlock - 1) / kBlock));
    const double total = weigh(adjusted, vocab, greatest, o.temperature, scratch.weights.data(), scratch.block_sums.data());
    token = draw_from_all(total, scratch);
  } else {
    token = draw_from_some(adjusted, greatest, scratch);
  }
  append(token);
  return token;
}

int32_t argmax(const float* logits, int32_t vocab) { return first_of(logits, vocab, checked_peak(logits, vocab)); }

float log_sum_exp(const float* logits, int32_t vocab) {
  const float greatest = checked_peak(logits, vocab);
  const double sum = weigh(logits, vocab, greatest, 1.0f, nullptr, nullptr);
  return static_cast<float>(static_cast<double>(greatest) + fixed_log(sum));
}

float log_softmax_at(const float* logits, int32_t vocab, int32_t token) {
  check_token(token, vocab, "log probability");
  return log_softmax_at(logits, log_sum_exp(logits, vocab), token);
}

void top_logprobs(const float* logits, int32_t vocab, float log_sum, int32_t count, int32_t* tokens, float* logprobs) {
  if (count < 0 || count > vocab) fail("top log probabilities: expected at most " + std::to_string(vocab) + ", found " + std::to_string(count));
  int32_t held = 0;
  for (int32_t id = 0; id < vocab && count > 0; id++) {
    if (held == count && !(logits[id] > logits[tokens[held - 1]])) continue;
    // Insertion from the end; later ids stay behind equal logits.
    int32_t at = held < count ? held++ : held - 1;
    for (; at > 0 && logits[id] > logits[tokens[at - 1]]; at--) tokens[at] = tokens[at - 1];
    tokens[at] = id;
  }
  for (int32_t i = 0; i < held; i++) logprobs[i] = log_softmax_at(logits, log_sum, tokens[i]);
}

}  // namespace penstock
