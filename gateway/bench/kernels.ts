/**
 * `bench kernels`: whole forwards of the native engine, attention and sampling included, and beside it another runtime on the
 * same file. Every runtime has a process of its own; runs are short and strictly alternate, so that what disturbs the machine
 * disturbs all of them alike; rounds in which other programs took the cores do not count, and figures are medians.
 * A ratio is the median over runs of one round; above 1 Penstock is the faster one.
 */
import { execFile } from "node:child_process"
import { mkdtempSync, readFileSync, rmSync } from "node:fs"
import { availableParallelism, cpus, tmpdir } from "node:os"
import { join } from "node:path"
import { fileURLToPath } from "node:url"
import { promisify } from "node:util"
import { Effect, Exit, Scope } from "effect"
import type { Env } from "../../config/env.ts"
import { bestInstructionSet, instructionSets, readGguf, type Gguf } from "../../kernels/index.ts"
import type { ResolvedModel } from "../../actors/node/fetch-model.ts"
import { Tokenizer } from "../../actors/request/tokenizer.ts"
import { median, rounded } from "./figures.ts"
import { table } from "../table.ts"
import { distinctTokens, numberOf, work } from "./work.ts"
import { besideOthers } from "./others.ts"
import { contextTokens, firstPromptTokens, longestPrompt, type KernelsOrder, type KernelsReport, type OpenOptions } from "./kernels-order.ts"
import { openVino } from "./openvino.ts"
import { BenchError, peerProcess, type Peer } from "./peer.ts"
import { requantiseToQ40 } from "./requantise.ts"
import { TimeBudget } from "./time-budget.ts"

export interface KernelsOptions {
  readonly vs: "llama.cpp" | "openvino" | undefined
  /** A text whose perplexity is told. */
  readonly text: string | undefined
  readonly env: Env
}

/** What is measured: name, tokens that a run yields, and its order. */
const workloads = [
  { name: "prefill512TokPerS", says: "prefill, 512 tokens", prompt: 512 },
  { name: "prefill2048TokPerS", says: "prefill, 2,048 tokens", prompt: 2048 },
  { name: "decode1TokPerS", says: "decode, batch 1", sequences: 1, steps: 32 },
  { name: "decode8TokPerS", says: "decode, batch 8", sequences: 8, steps: 16 },
  { name: "decode16TokPerS", says: "decode, batch 16", sequences: 16, steps: 16 },
] as const
type Workload = (typeof workloads)[number]
type RateName = Workload["name"]

export type Rates = Record<RateName, number>
export interface RuntimeFigures extends Rates {
  /** Of the fastest of these runs instead of the median. */
  readonly fastest: Rates
  /** In a fresh process: from before the model is loaded, its library being there, until a token is drawn after a prompt of 16. */
  readonly loadToFirstTokenMs: number
  /** Of the text; undefined where the runtime does not tell. */
  readonly perplexity: number | undefined
}

interface Compared {
  readonly runtime: string
  readonly figures: RuntimeFigures
  /** How many times faster Penstock is. */
  readonly ratio: Rates & { readonly loadToFirstTokenMs: number }
}

export interface KernelsFigures extends RuntimeFigures {
  readonly model: string
  readonly machine: string
  readonly isa: string
  readonly threads: number
  /** Of the cores' time during the runs that count: what other programs took. */
  readonly othersShare: Rates
  readonly contextTokens: number
  readonly perplexityTokens: number
  readonly peakGmacPerS: number
  readonly peakReadGbPerS: number
  /** Of the measured peaks: the products of the model's matrices (not of attention), and the bytes of its matrices and of the KV that a step of decode reads. */
  readonly macShare: Rates
  readonly bandwidthShare: Rates
  readonly peers: ReadonlyArray<Compared>
}

/** A round counts where other programs took no more of the cores than this; where too few do, the calmest ones count. */
const mostOthersShare = 0.1
const leastRounds = 3
/** How long a workload is measured, and, beside another runtime, how long at most until enough rounds count. */
const comparedMs = 10_000
const patienceMs = 90_000
/** Alone: at most, and of the time that is left as many shares as workloads and the text's perplexity still want. */
const aloneMs = 4_000
const leastAlone = 2
/** Rounds of fresh processes, and how long they take at most where nothing is compared. */
const loads = 3
const loadsMs = 6_000
/** For threads that look out for work a while before they sleep. */
const restMs = 50
/** Tokens of a text that are scored at most. */
const scoredTokens = 4_096

const penstockProgram = fileURLToPath(new URL("./penstock-process.ts", import.meta.url))
const llamaCppProgram = fileURLToPath(new URL("./llama-cpp-process.ts", import.meta.url))
const peaksProgram = fileURLToPath(new URL("../../build/kernels/penstock-peaks", import.meta.url))
const defaultText = fileURLToPath(new URL("./text.txt", import.meta.url))

type Process = Peer<KernelsOrder, KernelsReport>

interface Contestant {
  readonly name: string
  readonly start: Effect.Effect<Process, Error, Scope.Scope>
  readonly options: OpenOptions
  readonly scores: boolean
}

const attempt = <A>(run: () => Promise<A>): Effect.Effect<A, Error> => Effect.tryPromise({ try: run, catch: (error) => error as Error })

/** Starts a fresh process, and resolves to how long its model and first token took. */
const open = (contestant: Contestant, vocabulary: number): Effect.Effect<{ readonly process: Process; readonly tookMs: number }, Error, Scope.Scope> =>
  Effect.flatMap(contestant.start, (process) =>
    Effect.map(attempt(() => process.ask({ type: "open", open: contestant.options, prompt: distinctTokens(firstPromptTokens, vocabulary, 1) })), (tookMs) => ({ process, tookMs: tookMs as number })),
  )

const rest = (): Promise<void> => new Promise((resolve) => setTimeout(resolve, restMs))

/** Who is first takes turns. */
const inTurn = <A>(all: ReadonlyArray<A>, round: number): ReadonlyArray<readonly [number, A]> => all.map((_, i) => [(i + round) % all.length, all[(i + round) % all.length]!] as const)

/** One run of every contestant: tokens a second, and the most that others took of the cores during one of them. */
interface Round {
  readonly rates: ReadonlyArray<number>
  readonly othersShare: number
}

/** The rounds of one workload that count; `budgetMs` is what they may take where nothing is compared. */
const alternate = async (workload: Workload, processes: ReadonlyArray<Process>, vocabulary: number, budgetMs: number): Promise<ReadonlyArray<Round>> => {
  const rounds: Array<Round> = []
  const context = distinctTokens(contextTokens, vocabulary, 2)
  const compared = processes.length > 1
  let startedAtMs = performance.now()
  for (let number = -1; ; number++) {
    const tookMs = performance.now() - startedAtMs
    const calm = rounds.filter(({ othersShare }) => othersShare <= mostOthersShare).length >= leastRounds
    if (compared ? number >= leastRounds && tookMs > (calm ? comparedMs : patienceMs) : number >= leastAlone && tookMs > budgetMs) break
    const rates: Array<number> = []
    let mostShare = 0
    for (const [i, process] of inTurn(processes, Math.max(0, number))) {
      const order: KernelsOrder = "prompt" in workload
        ? { type: "prefill", prompt: distinctTokens(workload.prompt, vocabulary, 3 + number * processes.length + i) }
        : { type: "decode", context, sequences: workload.sequences, steps: workload.steps }
      const { value: runMs, othersShare } = await besideOthers(process.pid, () => process.ask(order))
      rates[i] = (("prompt" in workload ? workload.prompt : workload.sequences * workload.steps) * 1000) / (runMs as number)
      mostShare = Math.max(mostShare, othersShare ?? 0)
      await rest()
    }
    if (number >= 0) rounds.push({ rates, othersShare: mostShare })
    else startedAtMs = performance.now() // caches and contexts are warm
  }
  const calmest = rounds.toSorted((a, b) => a.othersShare - b.othersShare)
  return calmest.filter(({ othersShare }, i) => i < leastRounds || othersShare <= mostOthersShare)
}

const peaks = async (threads: number, isa: string): Promise<{ readonly peakGmacPerS: number; readonly peakReadGbPerS: number }> => {
  const { stdout } = await promisify(execFile)(peaksProgram, [String(threads), isa])
  return JSON.parse(stdout) as { peakGmacPerS: number; peakReadGbPerS: number }
}

const ratesOf = (rate: (workload: Workload) => number): Rates => Object.fromEntries(workloads.map((workload) => [workload.name, rounded(rate(workload))])) as Rates

const shares = (gguf: Gguf, rates: Rates, { peakGmacPerS, peakReadGbPerS }: { readonly peakGmacPerS: number; readonly peakReadGbPerS: number }) => {
  const { layerMacs, headMacs, layerBytes, headBytes, kvBytes } = work(gguf)
  // A prompt's logits are computed for its last token only, and its weights are read once a chunk.
  const macs = (workload: Workload) => ("prompt" in workload ? layerMacs + headMacs / workload.prompt : layerMacs + headMacs)
  const bytes = (workload: Workload) =>
    "prompt" in workload ? layerBytes / 512 + headBytes / workload.prompt : (layerBytes + headBytes) / workload.sequences + (contextTokens + workload.steps / 2) * kvBytes
  return {
    macShare: ratesOf((workload) => (rates[workload.name] * macs(workload)) / 1e9 / peakGmacPerS),
    bandwidthShare: ratesOf((workload) => (rates[workload.name] * bytes(workload)) / 1e9 / peakReadGbPerS),
  }
}

const perplexity = (logprobs: ReadonlyArray<number>): number => rounded(Math.exp(-logprobs.reduce((sum, logprob) => sum + logprob, 0) / logprobs.length))

/** The other runtimes that were asked for; llama.cpp also at its best, on a file that is written for it. */
const opponents = ({ vs, env }: KernelsOptions, options: OpenOptions): Effect.Effect<ReadonlyArray<Contestant>, Error, Scope.Scope> =>
  Effect.gen(function* () {
    if (vs === undefined) return []
    if (vs === "openvino") return [{ name: "OpenVINO GenAI", start: openVino(env.openVinoPython), options, scores: false }]
    const folder = yield* Effect.acquireRelease(
      Effect.sync(() => mkdtempSync(join(tmpdir(), "penstock-bench-"))),
      (path) => Effect.sync(() => rmSync(path, { recursive: true, force: true })),
    )
    const requantised = join(folder, "q4_0.gguf")
    yield* Effect.try({ try: () => requantiseToQ40(options.path, requantised), catch: (error) => error as Error })
    const start = peerProcess<KernelsOrder, KernelsReport>(llamaCppProgram)
    const shipped = { name: "llama.cpp, file as shipped", start, options: { ...options, from: env.nodeLlamaCpp }, scores: true }
    return [shipped, { ...shipped, name: "llama.cpp, requantised to Q4_0", options: { ...shipped.options, path: requantised } }]
  })

const readText = (path: string): string => {
  try {
    return readFileSync(path, "utf8")
  } catch (error) {
    throw new BenchError(`--text ${path}: ${(error as Error).message}`)
  }
}

/** Measures everything. */
export const kernelsFigures = (model: ResolvedModel, options: KernelsOptions): Effect.Effect<KernelsFigures, Error, Scope.Scope> =>
  Effect.gen(function* () {
    const time = new TimeBudget()
    const gguf = yield* attempt(() => readGguf(model.path))
    const text = yield* Effect.try({ try: () => readText(options.text ?? defaultText), catch: (error) => error as Error })
    const tokenizer = new Tokenizer(gguf.metadata)
    const context = numberOf(gguf.metadata, "context_length")
    if (context < longestPrompt) return yield* Effect.fail(new BenchError(`bench kernels: expected a model with a context of ${longestPrompt} tokens at least, found ${context}`))
    const tokens = tokenizer.encode(text, { special: false, bos: true }).slice(0, Math.min(scoredTokens, context))
    if (tokens.length < 2) return yield* Effect.fail(new BenchError("--text: expected a text of two tokens at least"))
    const threads = options.env.threads ?? availableParallelism()
    const best = bestInstructionSet()
    const isa = options.env.isa === undefined ? best : instructionSets[Math.min(instructionSets.indexOf(options.env.isa), instructionSets.indexOf(best))]!
    const own: OpenOptions = { path: model.path, threads, isa, from: undefined, scored: tokens.length }
    const penstock: Contestant = { name: "Penstock", start: peerProcess<KernelsOrder, KernelsReport>(penstockProgram), options: own, scores: true }
    const contestants = [penstock, ...(yield* opponents(options, { ...own, isa: undefined }))]

    const { vocabulary } = tokenizer
    const tookMs: ReadonlyArray<Array<number>> = contestants.map(() => [])
    const alone = contestants.length === 1
    const startedAtMs = performance.now()
    for (let round = 0; round < loads && (round === 0 || !alone || performance.now() - startedAtMs < loadsMs); round++) {
      for (const [i, contestant] of inTurn(contestants, round)) tookMs[i]!.push((yield* Effect.scoped(open(contestant, vocabulary))).tookMs)
    }
    const measuredPeaks = [yield* attempt(() => peaks(threads, isa))]
    const scope = yield* Scope.make()
    yield* Effect.addFinalizer(() => Scope.close(scope, Exit.void))
    const processes: Array<Process> = []
    for (const contestant of contestants) processes.push((yield* Scope.provide(open(contestant, vocabulary), scope)).process)
    const rounds = new Map<RateName, ReadonlyArray<Round>>()
    for (const [i, workload] of workloads.entries()) rounds.set(workload.name, yield* attempt(() => alternate(workload, processes, vocabulary, time.share(1 / (workloads.length + 1 - i), aloneMs))))
    // A text that was asked for is scored to its end; of the usual one what there is time for, and the same of it by all.
    const longestMs = alone && options.text === undefined ? time.leftMs : undefined
    const perplexities: Array<number | undefined> = []
    let scored = tokens.length - 1
    for (const [i, { scores }] of contestants.entries()) {
      const logprobs = scores ? ((yield* attempt(() => processes[i]!.ask({ type: "score", tokens: tokens.slice(0, scored + 1), longestMs }))) as ReadonlyArray<number>) : undefined
      scored = Math.min(scored, logprobs?.length ?? scored)
      perplexities.push(logprobs === undefined ? undefined : perplexity(logprobs))
    }
    yield* Scope.close(scope, Exit.void)
    measuredPeaks.push(yield* attempt(() => peaks(threads, isa)))

    const ratesAt = (name: RateName, i: number): ReadonlyArray<number> => rounds.get(name)!.map(({ rates }) => rates[i]!)
    const figuresOf = (i: number): RuntimeFigures => ({ ...ratesOf(({ name }) => median(ratesAt(name, i))), fastest: ratesOf(({ name }) => Math.max(...ratesAt(name, i))), loadToFirstTokenMs: rounded(median(tookMs[i]!)), perplexity: perplexities[i] })
    const ratioTo = (i: number): Compared["ratio"] => ({
      ...ratesOf(({ name }) => median(ratesAt(name, 0).map((rate, round) => rate / ratesAt(name, i)[round]!))),
      loadToFirstTokenMs: rounded(median(tookMs[0]!.map((ours, round) => tookMs[i]![round]! / ours))),
    })
    const peak = { peakGmacPerS: Math.max(...measuredPeaks.map(({ peakGmacPerS }) => peakGmacPerS)), peakReadGbPerS: Math.max(...measuredPeaks.map(({ peakReadGbPerS }) => peakReadGbPerS)) }
    const ours = figuresOf(0)
    return {
      model: model.name, machine: `${cpus()[0]?.model.trim() ?? "unknown"}, ${availableParallelism()} cores`, isa, threads, othersShare: ratesOf(({ name }) => median(rounds.get(name)!.map(({ othersShare }) => othersShare))), contextTokens,
      ...ours, perplexityTokens: scored, ...peak, ...shares(gguf, ours, peak),
      peers: contestants.slice(1).map(({ name }, i) => ({ runtime: name, figures: figuresOf(i + 1), ratio: ratioTo(i + 1) })),
    }
  })

/** The one JSON object: the peer's figures under `peer`, and those of the same peer at its best under `peerBest`. */
export const kernelsJson = ({ peers: [peer, best], ...own }: KernelsFigures): unknown => ({
  ...own,
  ...(peer === undefined ? {} : { peer: { runtime: peer.runtime, ...peer.figures }, ratio: peer.ratio }),
  ...(best === undefined ? {} : { peerBest: { runtime: best.runtime, ...best.figures }, ratioBest: best.ratio }),
})

export const kernelsTable = (figures: KernelsFigures): string => {
  const percent = (share: number): string => `${(share * 100).toFixed(1)} %`
  const row = (says: string, unit: string, value: (from: RuntimeFigures) => number | undefined, ratio: ((from: Compared["ratio"]) => number) | undefined, ...ends: ReadonlyArray<string>) => {
    const cell = (from: RuntimeFigures): string => (value(from) === undefined ? "" : `${value(from)}${unit}`)
    return [says, cell(figures), ...figures.peers.flatMap((peer) => [cell(peer.figures), ratio === undefined ? "" : String(ratio(peer.ratio))]), ...(ends.length === 0 ? ["", "", ""] : ends)]
  }
  return [
    `${figures.model}, ${figures.machine}, ${figures.isa}, ${figures.threads} threads; decode at a context of ${figures.contextTokens} tokens a sequence`,
    `peaks measured: ${figures.peakGmacPerS} G MAC/s, ${figures.peakReadGbPerS} GB/s read`,
    table([
      ["tokens a second", "Penstock", ...figures.peers.flatMap(({ runtime }) => [runtime, "ratio"]), "MAC share", "read share", "others"],
      ...workloads.map(({ name, says }) => row(says, "", (from) => from[name], (from) => from[name], percent(figures.macShare[name]), percent(figures.bandwidthShare[name]), percent(figures.othersShare[name]))),
      row("load to first token", " ms", (from) => from.loadToFirstTokenMs, (from) => from.loadToFirstTokenMs),
      row(`perplexity, ${figures.perplexityTokens} tokens`, "", (from) => from.perplexity, undefined),
    ]),
    ...(Math.max(...Object.values(figures.othersShare)) > mostOthersShare ? ["Other programs were busy meanwhile: measure again."] : []),
  ].join("\n")
}
