/**
 * The commands that look at a running Penstock and change it, over its HTTP address: `apply`, `status` and `drain`.
 */
import { readFileSync } from "node:fs"
import { setTimeout as sleep } from "node:timers/promises"
import { ConfigError } from "../config/config-error.ts"
import { limits } from "../config/limits.ts"
import { table } from "./table.ts"
import { summaryOf, type Change } from "../actors/node/change.ts"
import type { WorkerStatus } from "./actors-route.ts"
import { changeLines, workerTable } from "./status-lines.ts"
import type { TopologyState } from "./topology-access.ts"

export interface OperateOptions {
  readonly url: string
  /** An API key, where the server asks for one. */
  readonly key: string | undefined
  readonly json: boolean
}

interface ActorsBody {
  readonly workers: ReadonlyArray<WorkerStatus>
  readonly actors: ReadonlyArray<{ readonly kind: string; readonly id: string; readonly node: string; readonly pid: number; readonly state: string }>
}

const say = (line: string): void => void process.stdout.write(`${line}\n`)

const print = ({ json }: OperateOptions, value: unknown, lines: () => ReadonlyArray<string>): void => {
  if (json) say(JSON.stringify(value))
  else for (const line of lines()) say(line)
}

/** Throws a ConfigError with the server's own message, or with what to do where there is none. */
const ask = async ({ url, key }: OperateOptions, path: string, init: RequestInit = {}): Promise<unknown> => {
  const headers = { ...(key === undefined ? {} : { authorization: `Bearer ${key}` }), ...init.headers }
  let response: Response
  try {
    response = await fetch(new URL(path, url), { ...init, headers, signal: AbortSignal.timeout(limits.askDeadlineMs) })
  } catch (error) {
    const cause = error instanceof Error && error.cause instanceof Error ? (error.cause as NodeJS.ErrnoException).code : undefined
    throw new ConfigError([`${url}: no Penstock answers there (${cause ?? (error instanceof Error ? error.message : String(error))}): start one with npm start, or name another with --url URL`])
  }
  const body = (await response.json().catch(() => undefined)) as { readonly error?: { readonly message?: string } } | undefined
  if (response.ok && body !== undefined) return body
  const hint = response.status === 401 ? "; put a key into the variable PENSTOCK_KEY" : ""
  throw new ConfigError([`${body?.error?.message ?? `${url}${path}: answered ${response.status}, which no Penstock does`}${hint}`])
}

const stateOf = (options: OperateOptions) => ask(options, "/topology") as Promise<TopologyState>

/** Rewrites the server's topology with a file, and waits for what becomes of it. Resolves to the exit code. */
export const apply = async (file: string, options: OperateOptions & { readonly dryRun: boolean }): Promise<number> => {
  let text: string
  try {
    text = readFileSync(file, "utf8")
  } catch (error) {
    throw new ConfigError([`${file}: cannot be read (${(error as NodeJS.ErrnoException).code ?? "unknown error"}); give a topology file, such as config/topologies/disaggregated.yaml`])
  }
  const { json, dryRun } = options
  const { revision, plan } = (await ask(options, dryRun ? "/topology?dryRun=1" : "/topology", { method: "PUT", body: text })) as { readonly revision: string; readonly plan: ReadonlyArray<string> }
  if (!json) for (const line of plan.length === 0 ? ["nothing to change"] : ["the plan", ...plan.map((step, i) => `  ${i + 1}. ${step}`)]) say(line)
  if (dryRun) {
    if (json) say(JSON.stringify({ revision, plan }))
    return 0
  }
  const told = new Set<string>()
  for (;;) {
    const state = await stateOf(options)
    const change = state.changes.find((one) => one.revision === revision)
    // Where there was nothing to change, the steps of this revision are an earlier command's.
    if (!json && plan.length > 0 && change !== undefined && state.revision === revision) tellSteps(change, told)
    if (state.state === "changing") {
      await sleep(limits.operatePollMs)
      continue
    }
    const outcome = state.revision === revision ? change?.outcome : state.refused === undefined ? "superseded" : "refused"
    const error = outcome === "refused" ? state.refused : outcome === "superseded" ? `another topology has come since: its revision is ${state.revision}` : change?.error
    print(options, { revision, outcome, error: error ?? null, steps: change?.steps ?? [], left: state.plan }, () =>
      outcome === "done" ? ["done"] : [`${outcome}: ${error}`, ...(state.plan.length === 0 ? [] : ["not done", ...state.plan.map((step) => `  ${step}`)])],
    )
    return outcome === "done" ? 0 : 1
  }
}

const tellSteps = ({ at, steps }: Change, told: Set<string>): void => {
  for (const [i, { step, state, ms, error }] of steps.entries()) {
    if ((state !== "done" && state !== "failed") || told.has(`${at} ${i}`)) continue
    told.add(`${at} ${i}`)
    say(`  ${step}: ${state === "done" ? "done" : `FAILED: ${error}`} (${((ms ?? 0) / 1000).toFixed(1)} s)`)
  }
}

/** What is wanted beside what runs. */
export const status = async (options: OperateOptions): Promise<number> => {
  const [{ text: _, ...topology }, actors] = await Promise.all([stateOf(options), ask(options, "/actors") as Promise<ActorsBody>])
  print(options, { ...topology, ...actors }, () => statusLines(topology, actors))
  return 0
}

const statusLines = (state: Omit<TopologyState, "text">, { workers, actors }: ActorsBody): ReadonlyArray<string> => [
  `${state.state}: revision ${state.revision} of ${state.path}`,
  ...(state.refused === undefined ? [] : [`the file as it is now is refused: ${state.refused}`]),
  ...(state.plan.length === 0 ? [] : ["still to do", ...state.plan.map((step) => `  ${step}`)]),
  "",
  workerTable(workers, state.topology, state.drained),
  "",
  table([["actor", "process", "state"], ...actors.filter(({ kind }) => kind !== "prefill" && kind !== "decode").map(({ kind, id, node, pid, state: is }) => [`${kind} ${id}`, `${node} ${pid}`, is])]),
  "",
  ...changeLines(state.changes.slice(0, limits.shownChanges).map(summaryOf)),
]

/** Takes a worker's roles, or gives them back, and waits until that is so. */
export const drain = async (worker: string, options: OperateOptions & { readonly undo: boolean }): Promise<number> => {
  const { undo } = options
  await ask(options, "/topology/drain", { method: "POST", body: JSON.stringify({ worker, undo }) })
  let state = await stateOf(options)
  for (; state.state === "changing"; state = await stateOf(options)) await sleep(limits.operatePollMs)
  const [newest] = state.changes
  print(options, { worker, drained: state.drained.includes(worker), outcome: newest?.outcome, error: newest?.error ?? null }, () => [
    state.state === "failed" ? `failed: ${newest?.error}` : undo ? `${worker} has its roles again` : `${worker} is drained: it keeps its weights and its KV, and takes nothing new; give it back with drain ${worker} --undo`,
  ])
  return state.state === "failed" ? 1 : 0
}
