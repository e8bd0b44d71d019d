/**
 * What runs, or shall run, as plain data: what a plan is made from. A running system and a wanted one have the same shape.
 */
import type { Role } from "../messages/scheduler.ts"
import type { Component } from "./component.ts"

/** In the process of `up`, or in one of its own over NATS. */
export type Host = "embedded" | "process"

/** Settings by name, as the topology says them. */
export type Settings = Readonly<Record<string, string | number>>

export interface PlannedComponent extends Component {
  readonly generation: string
  readonly host: Host
  /** Of a worker; none while it is drained. Empty for every other kind. */
  readonly roles: ReadonlyArray<Role>
  /** What changes while it runs. */
  readonly live: Settings
  /** What it has to start again for. */
  readonly fixed: Settings
  /** Of a worker that runs: the blocks that it was started with, as asked and as they came to be. */
  readonly pool?: { readonly asked: string | number; readonly blocks: number }
}

export interface System {
  /** The NATS that processes are reached by, as people read it; undefined: everything is in one process. */
  readonly bus: string | undefined
  /** Where new requests go. */
  readonly generation: { readonly id: string; readonly label: string } | undefined
  readonly components: ReadonlyArray<PlannedComponent>
  /** Host, port and keys of the gateway; undefined: it does not listen. */
  readonly listen: Settings | undefined
}

export const nothing: System = { bus: undefined, generation: undefined, components: [], listen: undefined }

/** What a component is known by: in one generation no two of a kind have the same id. */
export const keyOf = ({ generation, kind, id }: Pick<PlannedComponent, "generation" | "kind" | "id">): string => `${generation} ${kind} ${id}`

export const sameSettings = (a: Settings, b: Settings): boolean => Object.keys({ ...a, ...b }).every((name) => a[name] === b[name])

/** `threads 1 -> 2, device cpu -> cuda` */
export const differences = (from: Settings, to: Settings): ReadonlyArray<string> =>
  Object.keys({ ...from, ...to }).flatMap((name) => (from[name] === to[name] ? [] : [`${name} ${from[name] ?? "none"} -> ${to[name] ?? "none"}`]))
