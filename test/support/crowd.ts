/** Many requests at once, of every kind that changes what is drawn. */
const topics = ["the sea", "a small dog", "prime numbers", "the city at night", "bread", "snow in April", "an old clock", "how rivers begin"]

/** Greedy and sampled completions of different lengths. */
export const crowd = (size: number): ReadonlyArray<Record<string, unknown>> =>
  Array.from({ length: size }, (_, i) => {
    const prompt = `${"Once upon a time there was a story. ".repeat(i % 7)}Tell me about ${topics[i % topics.length]}, number ${i}.`
    const sampling = [
      { temperature: 0 },
      { temperature: 1, seed: i },
      { temperature: 0.8, top_p: 0.9, top_k: 40, seed: i },
      { temperature: 1.3, min_p: 0.05, presence_penalty: 0.5, frequency_penalty: 0.3, repetition_penalty: 1.1, seed: i },
    ]
    return { prompt, max_tokens: 8 + (i % 5) * 6, ignore_eos: true, ...sampling[i % 4] }
  })
