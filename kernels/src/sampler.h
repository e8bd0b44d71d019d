// Drawing the next token, and log probabilities. Every result is a pure function of options, tokens and logits.
//
// Order of operations, as users of vLLM and llama.cpp expect:
//   1. copy the raw logits; log probabilities are always the log-softmax of these
//   2. add the logit bias
//   3. repetition penalty (tokens of prompt and output), then presence and frequency penalties (tokens of the output)
//   4. while the output is shorter than min_tokens: suppress suppressed_tokens
//   5. temperature 0 (below 1e-6): the most likely token, lowest id on ties. Otherwise divide by the temperature
//   6. top-k, then top-p on the softmax of what top-k left, then min-p
//   7. one draw: a number of the counter-based generator keyed by (seed, choice, position), where position is the
//      length of prompt and output together
// Candidates are ordered by (logit descending, id ascending), and sums over them follow that order; sums over a whole
// vocabulary run in blocks of 1024 ids, each in 16 lanes (id mod 16) and one tree, then over the blocks in order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace penstock {

// Mirror of SamplerOptions in kernels/index.ts, which says what each means.
struct SamplerOptions {
  float temperature = 0.0f;
  int32_t top_k = 0;
  float top_p = 1.0f;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  std::vector<std::pair<int32_t, float>> logit_bias;  // the biases of a token named twice add up
  std::vector<int32_t> suppressed_tokens;
  int32_t min_tokens = 0;
  uint64_t seed = 0;
  uint32_t choice = 0;
};

struct Candidate {
  float logit;
  float weight;  // exp((logit - greatest logit) / temperature)
  int32_t id;
};

// Memory that draws reuse: one per thread that draws, grown once to the vocabulary, nothing allocated after that.
struct SamplerScratch {
  std::vector<float> logits;         // [vocabulary] adjusted logits
  std::vector<float> weights;        // [vocabulary]
  std::vector<double> block_sums;    // [ceil(vocabulary / 1024)]
  std::vector<Candidate> candidates; // at most [vocabulary]
};

class Sampler {
 public:
  // Tokens so far; a sampler made with the same options and tokens continues identically. Throws std::runtime_error
  // where an option is out of range or a token is not in 0 … vocabulary-1.
  Sampler(SamplerOptions options, int32_t vocabulary, const int32_t* prompt, size_t prompt_length, const int32_t* output,
          size_t output_length);

  // Draws the next token and appends it to the output. Throws std::runtime_error on a logit that is not finite, and
  // leaves the sampler as it was.
  int32_t draw(const float* logits /* [vocab] */, int32_t vocab, SamplerScratch& scratch);

  // Appends a token that was decided elsewhere (a scored target).
  void append(int32_t token);

  size_t output_length() const { return output_length_; }
  // Of the next token: the length of prompt and output together.
  uint64_t position() const { return static_cast<uint64_t>(prompt_length_) + output_length_; }
  // Whether the next token is drawn from other logits than the model's.
  bool adjusts() const;
  const SamplerOptions& options() const { return options_; }

 private:
  bool suppresses() const;
  const float* adjust(const float* logits, SamplerScratch& scratch) const;
  int32_t draw_from_all(double total, const SamplerScratch& scratch) const;
  int32_t draw_from_some(const float* logits, float greatest, SamplerScratch& scratch) const;
  double uniform() const;

  SamplerOptions options_;
  int32_t vocabulary_;
  size_t prompt_length_;
  size_t output_length_;
  bool counting_;                               // whether any penalty is on
  std::unordered_map<int32_t, uint32_t> seen_;  // token of prompt or output -> occurrences in the output
};

// The id of the greatest logit, the lowest on ties. Throws std::runtime_error on a logit that is not finite.
int32_t argmax(const float* logits /* [vocab] */, int32_t vocab);

// log of the sum of exp(logits), in the fixed order above. Throws std::runtime_error on a logit that is not finite.
float log_sum_exp(const float* logits /* [vocab] */, int32_t vocab);

// Log-softmax at one token, from log_sum_exp of the same logits or from scratch.
inline float log_softmax_at(const float* logits, float log_sum, int32_t token) { return logits[token] - log_sum; }
float log_softmax_at(const float* logits /* [vocab] */, int32_t vocab, int32_t token);

// The `count` most likely tokens, most likely first, ties by lowest id; count is at most vocab.
void top_logprobs(const float* logits /* [vocab] */, int32_t vocab, float log_sum, int32_t count,
                  int32_t* tokens /* [count] */, float* logprobs /* [count] */);

}  // namespace penstock
