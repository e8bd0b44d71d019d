/** Conversations by previous_response_id: what is cached is what block arithmetic says, to the token. */
import { afterEach, expect, it } from "vitest"
import OpenAI from "openai"
import { startNode, type StartedNode } from "../support/start-node.ts"

const blockTokens = 16
const end = 2 // <|im_end|>
let node: StartedNode
afterEach(() => node.stop())

const start = async () => {
  node = await startNode({ tiny: { context: 1024 } })
  return new OpenAI({ baseURL: `${node.url}/v1`, apiKey: "none", maxRetries: 0 })
}

/** The KV of the last token drawn was not computed, and at least one token of a prompt always is. */
const expectedCached = (known: number, prompt: number): number => Math.floor(Math.min(known, prompt - 1) / blockTokens) * blockTokens

const tokensOf = async (content: string): Promise<number> => {
  const response = await fetch(`${node.url}/tokenize`, { method: "POST", body: JSON.stringify({ content }) })
  return ((await response.json()) as { tokens: ReadonlyArray<number> }).tokens.length
}

it("a conversation goes on from its own ids, so that every full block of it is found, whatever the lengths", async () => {
  const client = await start()
  // No answer ends with a token that the template writes.
  const more = { temperature: 1, ignore_eos: true, logit_bias: { 0: -100, [end]: -100 } }
  const ask = (input: string, maxTokens: number, previous?: string) =>
    client.responses.create({ model: "tiny", input, max_output_tokens: maxTokens, previous_response_id: previous, ...more } as never) as Promise<OpenAI.Responses.Response>
  for (const [round, first] of [20, 27, 28, 29, 43].entries()) {
    let known = 0
    let before: OpenAI.Responses.Response | undefined
    for (const [turn, maxTokens] of [first, 17, 1, 32].entries()) {
      const input = `Round ${round}, turn ${turn}: the water comes down and the wheel turns.`
      const response = await ask(input, maxTokens, before?.id)
      const { input_tokens: prompt, output_tokens: answer, input_tokens_details: details } = response.usage!
      expect(answer).toBe(maxTokens)
      const turnText = `<|im_start|>user\n${input}<|im_end|>\n<|im_start|>assistant\n`
      // The answer was cut off: the template ends it.
      const earlier = before === undefined ? 0 : known + 1
      expect(prompt).toBe(earlier + (await tokensOf(before === undefined ? turnText : `<|im_end|>\n${turnText}`)))
      if (turn > 0) expect(details.cached_tokens, `round ${round}, turn ${turn}`).toBe(expectedCached(known, prompt))
      known = prompt + answer - 1
      before = response
    }
  }
})

it("a turn that ended with the model's own end goes on behind it, and its tokens are those of a prompt of the same ids", async () => {
  const client = await start()
  const more = { temperature: 0, ignore_eos: true, return_token_ids: true }
  const first = (await client.responses.create({ model: "tiny", input: "The gate is open.", max_output_tokens: 40, ...more, ignore_eos: false, logit_bias: { [end]: 4 }, seed: 3 } as never)) as OpenAI.Responses.Response
  const second = (await client.responses.create({ model: "tiny", input: "And the stream is full.", max_output_tokens: 20, previous_response_id: first.id, ...more } as never)) as OpenAI.Responses.Response
  const idsOf = (response: OpenAI.Responses.Response) => (response.output[0] as unknown as { token_ids: ReadonlyArray<number> }).token_ids
  expect([first.status, idsOf(first).at(-1)]).toEqual(["completed", end])
  const tokenize = async (content: string) => ((await (await fetch(`${node.url}/tokenize`, { method: "POST", body: JSON.stringify({ content }) })).json()) as { tokens: ReadonlyArray<number> }).tokens
  const prompt = [
    ...(await tokenize("<|im_start|>user\nThe gate is open.<|im_end|>\n<|im_start|>assistant\n")),
    ...idsOf(first),
    ...(await tokenize("\n<|im_start|>user\nAnd the stream is full.<|im_end|>\n<|im_start|>assistant\n")),
  ]
  expect(second.usage!.input_tokens).toBe(prompt.length)
  const plain = await fetch(`${node.url}/v1/completions`, { method: "POST", body: JSON.stringify({ model: "tiny", prompt, max_tokens: 20, ...more }) })
  expect(((await plain.json()) as { choices: ReadonlyArray<{ token_ids: unknown }> }).choices[0]!.token_ids).toEqual(idsOf(second))
})
