/** What `bench serve` asks of a running topology: conversations, a shared system prompt, and streams of short chats. */
import { median, quantile, rounded } from "./figures.ts"
import { rest, type Answer, type Client } from "./serve-client.ts"

/** Sizes in tokens. */
export const sizes = { question: 40, answer: 24, loadPrompt: 100, loadAnswer: 64 } as const
const longestHistory = 2_000
const probeTokens = 500
/** What a history may cost that is computed; on a slow machine it is shorter. */
const longestColdMs = 1_500

/** Tokens of a long history, as this machine computes them. */
export const historyTokens = (probeMs: number): number => Math.min(longestHistory, Math.max(probeTokens, Math.floor(((probeTokens / probeMs) * longestColdMs) / 100) * 100))

export const probe = async (client: Client): Promise<number> => (await client.complete(await client.tokens(probeTokens), 1)).firstMs

/** Repeats a measurement for this long, and at least once. */
export const repeated = async <A>(budgetMs: number, measure: () => Promise<A>): Promise<ReadonlyArray<A>> => {
  const startedAtMs = performance.now()
  const all = [await measure()]
  // One that would not end in time is not begun.
  while ((performance.now() - startedAtMs) * (1 + 1 / all.length) < budgetMs) all.push(await measure())
  return all
}

export interface ConversationFigures {
  readonly historyTokens: number
  readonly streams: number
  readonly rounds: number
  /** Time to the first token of each turn, the first of which is cold. */
  readonly ttftMs: ReadonlyArray<number>
  /** Turn 2 against the cold turn 1 of the same conversation. */
  readonly turn2Ratio: number
  readonly promptTokens: ReadonlyArray<number>
  readonly cachedTokens: ReadonlyArray<number>
  /** Turns, but the first, whose cached tokens are exactly the full blocks of all that was computed before. */
  readonly exactTurns: string
}

/**
 * Conversations by previous_response_id: a long first message, then short ones. All ask a turn at the same moment, and the next
 * when all are answered, so that a second turn does not wait for the first of another.
 */
const converse = async (client: Client, history: number, turns: number, count: number): Promise<ReadonlyArray<ReadonlyArray<Answer>>> => {
  const all = Array.from({ length: count }, (): Array<Answer> => [])
  for (let turn = 0; turn < turns; turn++) {
    const questions = await Promise.all(all.map(() => client.text(turn === 0 ? history : sizes.question)))
    await Promise.all(all.map(async (answers, i) => answers.push(await client.respond(questions[i]!, answers.at(-1)?.id, sizes.answer))))
    await rest()
  }
  return all
}

/** The KV of an answer's last token is never computed, and a prompt's last token always is. */
const expectedCached = ({ promptTokens, answerTokens }: Answer, next: Answer, blockTokens: number): number =>
  Math.floor(Math.min(promptTokens + answerTokens - 1, next.promptTokens - 1) / blockTokens) * blockTokens

export interface ConversationOptions {
  /** Tokens of the first message. */
  readonly history: number
  readonly turns: number
  /** Conversations at a time. */
  readonly streams: number
  readonly blockTokens: number
  readonly budgetMs: number
}

export const conversations = async (client: Client, { history, turns, streams: count, blockTokens, budgetMs }: ConversationOptions): Promise<ConversationFigures> => {
  const rounds = await repeated(budgetMs, () => converse(client, history, turns, count))
  const all = rounds.flat()
  const ofTurn = (figure: (answer: Answer) => number) => Array.from({ length: turns }, (_, turn) => rounded(median(all.map((answers) => figure(answers[turn]!)))))
  const later = all.flatMap((answers) => answers.slice(1).map((answer, i) => answer.cachedTokens === expectedCached(answers[i]!, answer, blockTokens)))
  return {
    historyTokens: history,
    streams: count,
    rounds: rounds.length,
    ttftMs: ofTurn(({ firstMs }) => firstMs),
    turn2Ratio: rounded(median(all.map(([cold, second]) => second!.firstMs / cold!.firstMs))),
    promptTokens: ofTurn(({ promptTokens }) => promptTokens),
    cachedTokens: ofTurn(({ cachedTokens }) => cachedTokens),
    exactTurns: `${later.filter(Boolean).length} of ${later.length}`,
  }
}

export interface SharedPromptFigures {
  readonly systemTokens: number
  readonly users: number
  readonly firstMs: number
  readonly othersMs: number
  readonly ratio: number
  /** Of the others. */
  readonly cachedTokens: number
}

const mostUsers = 32
const leastUsers = 4

/** Users of one system prompt, one after the other, each with a question of its own; in the first round as many as there is time for. */
export const sharedPrompt = async (client: Client, systemTokens: number, budgetMs: number): Promise<SharedPromptFigures> => {
  const startedAtMs = performance.now()
  let users = 0
  const rounds = await repeated(budgetMs, async () => {
    const system = { role: "system", content: await client.text(systemTokens) }
    const answers: Array<Answer> = []
    const enough = () => (users > 0 ? answers.length >= users : answers.length >= mostUsers || (answers.length >= leastUsers && performance.now() - startedAtMs > budgetMs))
    for (let user = 0; !enough(); user++) {
      answers.push(await client.chat([system, { role: "user", content: await client.text(sizes.question) }], 2))
      if (user === 0) await rest()
    }
    users = answers.length
    return { first: answers[0]!, others: answers.slice(1) }
  })
  const othersMs = rounds.map(({ others }) => median(others.map(({ firstMs }) => firstMs)))
  return {
    systemTokens,
    users,
    firstMs: rounded(median(rounds.map(({ first }) => first.firstMs))),
    othersMs: rounded(median(othersMs)),
    ratio: rounded(median(rounds.map(({ first }, i) => othersMs[i]! / first.firstMs))),
    cachedTokens: median(rounds.flatMap(({ others }) => others.map(({ cachedTokens }) => cachedTokens))),
  }
}

export interface LoadFigures {
  readonly requests: number
  readonly requestsPerS: number
  readonly tokPerS: number
  readonly ttftP50Ms: number
  readonly ttftP99Ms: number
  readonly promptTokens: number
}

const loadFigures = (answers: ReadonlyArray<Answer>, tookMs: number): LoadFigures => ({
  requests: answers.length,
  requestsPerS: rounded((answers.length * 1000) / tookMs),
  tokPerS: rounded((answers.reduce((sum, { answerTokens }) => sum + answerTokens, 0) * 1000) / tookMs),
  ttftP50Ms: rounded(quantile(answers.map(({ firstMs }) => firstMs), 0.5)),
  ttftP99Ms: rounded(quantile(answers.map(({ firstMs }) => firstMs), 0.99)),
  promptTokens: median(answers.map(({ promptTokens }) => promptTokens)),
})

/** Chats that nobody sent before; so many that none is waited for while it is timed. */
const chats = (client: Client, count: number) => Promise.all(Array.from({ length: count }, async () => [{ role: "user", content: await client.text(sizes.loadPrompt) }]))

/** As many streams as said, each asking again as soon as it is answered, but not when time is up. */
export const streams = async (client: Client, count: number, requestsOfStream: number, budgetMs: number): Promise<LoadFigures> => {
  const waiting = await chats(client, count * requestsOfStream)
  const answers: Array<Answer> = []
  const startedAtMs = performance.now()
  const stream = async () => {
    const ownAtMs = performance.now()
    for (let [next, done] = [waiting.pop(), 0]; next !== undefined; next = waiting.pop()) {
      answers.push(await client.chat(next, sizes.loadAnswer))
      if ((performance.now() - ownAtMs) * (1 + 1 / ++done) > budgetMs) return
    }
  }
  await Promise.all(Array.from({ length: count }, stream))
  return loadFigures(answers, performance.now() - startedAtMs)
}

/** Requests that come evenly, whether the earlier ones are answered or not. */
export const openLoad = async (client: Client, requestsPerS: number, count: number): Promise<LoadFigures> => {
  const waiting = await chats(client, count)
  const startedAtMs = performance.now()
  const answers = await Promise.all(
    waiting.map(async (messages, i) => {
      await rest((i * 1000) / requestsPerS)
      return client.chat(messages, sizes.loadAnswer)
    }),
  )
  return loadFigures(answers, performance.now() - startedAtMs)
}
