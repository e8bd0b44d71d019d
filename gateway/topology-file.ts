/**
 * The file that says what is wanted: read again whenever it changes, and rewritten where the topology is changed over HTTP. What
 * is wrong with it is said once and changes nothing; a model is here before anything is changed for it.
 */
import { createHash } from "node:crypto"
import { readFileSync, realpathSync, renameSync, rmSync, writeFileSync } from "node:fs"
import { basename, dirname, join } from "node:path"
import { Effect, type Scope } from "effect"
import { ConfigError } from "../config/config-error.ts"
import { parseTopology, revisionOf, type LoadedTopology, type TopologyOverrides } from "../config/load-topology.ts"
import type { ModelSpec } from "../config/models.ts"
import { watchTopology, type TopologyWatch } from "../config/watch-topology.ts"
import { contextTokensOf } from "../actors/node/component.ts"
import type { ResolvedModel } from "../actors/node/fetch-model.ts"
import type { Reconciler } from "../actors/node/reconciler.ts"
import { fixedFor, type Wanted } from "../actors/node/wanted.ts"
import { readKeys } from "./keys.ts"
import { StaleRevision, type TopologyAccess, type TopologyState } from "./topology-access.ts"

export interface TopologyFileOptions {
  readonly loaded: LoadedTopology
  readonly overrides: TopologyOverrides
  /** Makes a model present on this machine; rejects with one readable message. */
  readonly fetchModel: (spec: ModelSpec) => Promise<ResolvedModel>
  /** Where it says what it does not do. */
  readonly say: (line: string) => void
}

export class TopologyFile {
  readonly #options: TopologyFileOptions
  #accepted: LoadedTopology
  #refused: string | undefined
  #fetching = false
  #takes = 0
  #reconciler: Reconciler | undefined
  #watch: TopologyWatch | undefined

  constructor(options: TopologyFileOptions) {
    this.#options = options
    this.#accepted = options.loaded
  }

  /** Follows the file until the Scope closes. */
  follow(reconciler: Reconciler): Effect.Effect<void, never, Scope.Scope> {
    return Effect.asVoid(
      Effect.acquireRelease(
        Effect.sync(() => {
          this.#reconciler = reconciler
          const { path, text } = this.#accepted
          return (this.#watch = watchTopology({
            path,
            text,
            onText: (now) => void this.#take(now),
            onUnreadable: (why) => this.#refuse(`${basename(path)}: ${why}`),
          }))
        }),
        (watching) => Effect.sync(() => watching.close()),
      ),
    )
  }

  readonly access: TopologyAccess = {
    state: () => this.#state(),
    put: (text, { dryRun, ifRevision }) => this.#put(text, dryRun, ifRevision),
    drain: (worker, undo) => this.#running.drain(worker, undo),
  }

  get #running(): Reconciler {
    if (this.#reconciler === undefined) throw new ConfigError(["the topology is still brought up: try again in a moment"])
    return this.#reconciler
  }

  #state(): TopologyState {
    const { revision, path, text, topology } = this.#accepted
    const reconciler = this.#reconciler
    const wanted = reconciler?.wanted
    return {
      revision,
      path,
      text,
      topology,
      state: this.#fetching || reconciler === undefined ? "changing" : reconciler.state,
      plan: reconciler === undefined || wanted === undefined ? [] : reconciler.planFor(wanted),
      changes: reconciler?.changes ?? [],
      drained: [...(reconciler?.drained ?? [])],
      refused: this.#refused,
    }
  }

  /** Throws a ConfigError where it cannot follow what runs. */
  #check(text: string): LoadedTopology {
    const { path } = this.#accepted
    const next = parseTopology(text, { path, overrides: this.#options.overrides })
    const fixed = fixedFor(this.#accepted.topology, next.topology)
    if (fixed.length > 0) throw new ConfigError(fixed.map((problem) => `${basename(path)}: ${problem}`))
    const { keys } = next.topology.gateway
    if (keys !== null) readKeys(keys)
    return next
  }

  async #take(text: string): Promise<void> {
    const take = ++this.#takes
    try {
      const next = this.#check(text)
      this.#fetching = true
      const model = await this.#options.fetchModel(next.model)
      await Effect.runPromise(contextTokensOf({ topology: next.topology, model }))
      if (take !== this.#takes) return // a newer text has come while the model did
      this.#accepted = next
      this.#refused = undefined
      this.#running.want({ topology: next.topology, model, revision: next.revision })
    } catch (error) {
      if (take === this.#takes) this.#refuse(error instanceof Error ? error.message : String(error))
    } finally {
      if (take === this.#takes) this.#fetching = false
    }
  }

  #refuse(why: string): void {
    this.#refused = why
    this.#options.say(`${why}\nnothing is changed until ${basename(this.#accepted.path)} is mended`)
  }

  async #put(text: string, dryRun: boolean, ifRevision: string | undefined): Promise<{ readonly revision: string; readonly plan: ReadonlyArray<string> }> {
    const { path, revision } = this.#accepted
    const next = this.#check(text)
    if (ifRevision !== undefined) {
      if (ifRevision !== revision) throw new StaleRevision(revision)
      const there = revisionOf(readFileSync(path, "utf8"))
      if (there !== ifRevision) throw new StaleRevision(there)
    }
    const plan = this.#running.planFor(await this.#expected(next))
    if (!dryRun) {
      rewrite(path, text)
      this.#watch?.expect(text)
      void this.#take(text)
    }
    return { revision: next.revision, plan }
  }

  /** The model as far as it is known without being fetched. */
  async #expected({ topology, model: spec, revision }: LoadedTopology): Promise<Wanted> {
    if (spec.path !== undefined) return { topology, revision, model: await this.#options.fetchModel(spec) }
    const { name, aliases } = spec
    const running = this.#running.wanted?.model
    const sha256 = spec.sha256 ?? (running?.name === name ? running.sha256 : createHash("sha256").update(JSON.stringify(spec.sources)).digest("hex"))
    return { topology, revision, model: { name, aliases, path: "", sha256 } }
  }
}

/** A reader sees the old text, or the whole new one. */
const rewrite = (path: string, text: string): void => {
  const file = realpathSync(path)
  const aside = join(dirname(file), `.${basename(file)}.${process.pid}`)
  try {
    writeFileSync(aside, text)
    renameSync(aside, file)
  } catch (error) {
    rmSync(aside, { force: true })
    throw new ConfigError([`${file}: cannot be rewritten (${(error as NodeJS.ErrnoException).code ?? "unknown error"}): let this user write to its folder, or edit the file yourself`])
  }
}
