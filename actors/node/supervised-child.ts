/** What a component's process and its supervisor say to each other, whether the supervisor started it or has adopted it. */
import type { NatsAddress, Topology } from "../../config/topology.ts"
import type { Component } from "./component.ts"
import type { ResolvedModel } from "./fetch-model.ts"

/** What a child is told to run, once. */
export interface ChildOrder {
  readonly component: Component
  readonly topology: Topology
  readonly model: ResolvedModel
  readonly namespace: string
  readonly nats: NatsAddress
  /** The least that it runs under. */
  readonly epoch?: number
  /** The node of a cluster that it is part of. */
  readonly agent?: string | undefined
  /** The socket on which it waits for another supervisor when this one is gone; absent: it ends with its supervisor. */
  readonly control?: string | undefined
}

/** A worker's `blocks`: how many its pool was made with. */
export type ChildReport = { readonly type: "ready"; readonly blocks: number | undefined } | { readonly type: "alive" } | { readonly type: "failed"; readonly message: string }

/** What a process says first to a supervisor that takes over. */
export interface Hello {
  readonly type: "hello"
  readonly pid: number
  readonly component: Component
  readonly epoch: number
  /** Whether it serves already. */
  readonly ready: boolean
  readonly blocks: number | undefined
}

/** What a supervisor needs of a process: one of its own, or one that it has adopted. */
export interface SupervisedChild {
  readonly pid?: number | undefined
  readonly exitCode: number | null
  readonly signalCode: NodeJS.Signals | null
  kill(signal: NodeJS.Signals): boolean
  on(event: "message", listener: (report: ChildReport) => void): unknown
  once(event: "error", listener: (error: Error) => void): unknown
  once(event: "exit", listener: (code: number | null, signal: NodeJS.Signals | null) => void): unknown
  removeListener(event: "message", listener: (report: ChildReport) => void): unknown
}
