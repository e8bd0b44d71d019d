/** `GET /actors`: who serves, where, and how KV moves between them, as every process announces it. */
import { hostname } from "node:os"
import { Effect } from "effect"
import type { PresenceMessage } from "../actors/messages/presence.ts"
import { json, type Handler } from "./call.ts"

const rounded = (value: number): number => Math.round(value * 10) / 10

export type Present = PresenceMessage & { readonly generation: string }
export type WorkerStatus = ReturnType<typeof workersOf>[number]

export const workersOf = (members: ReadonlyArray<Present>) =>
  members.flatMap(({ id, node, agent, pid, epoch, worker, generation }) => {
    if (worker === undefined) return []
    const { roles, device, load, kv, prefillTokPerS } = worker
    // From this bandwidth on, moving KV is faster than computing it here.
    const breakEvenMbPerS = prefillTokPerS === undefined ? null : rounded((prefillTokPerS * kv.bytesPerToken) / 1e6)
    return [{ name: id, generation, node, agent, pid, roles, device, epoch, load, kv, prefillTokPerS: prefillTokPerS === undefined ? null : rounded(prefillTokPerS), breakEvenMbPerS }]
  })

const actorsOf = (members: ReadonlyArray<Present>) =>
  members.flatMap(({ kind, id, generation, node, pid, state, worker, store }) => (worker?.roles ?? [kind]).map((role: string) => ({ kind: role, id, generation, node, pid, state, ...(store === undefined ? {} : { store }) })))

const transfersOf = (members: ReadonlyArray<PresenceMessage>) => {
  const sum = { completed: 0, failed: 0, fallbacks: 0, bytes: 0, ms: 0 }
  for (const { worker } of members) {
    if (worker === undefined) continue
    for (const key of Object.keys(sum) as Array<keyof typeof sum>) sum[key] += worker.transfers[key]
  }
  const { ms, ...counts } = sum
  return { ...counts, mbPerS: ms === 0 ? 0 : rounded(counts.bytes / 1000 / ms) }
}

export const actors: Handler = (gateway) =>
  Effect.sync(() => {
    const members = gateway.members().flatMap(({ generation, members }) => members.map((member): Present => ({ ...member, generation })))
    const here = { kind: "gateway", id: "g0", generation: gateway.generation, node: hostname(), pid: process.pid, state: gateway.admission.closing ? "leaving" : "serving" }
    return json(200, { workers: workersOf(members), actors: [here, ...actorsOf(members)], transfers: transfersOf(members) })
  })
