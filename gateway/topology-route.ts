/** `/topology`: what is wanted, what of it is done and what is left, and how to change it while it runs. */
import { Effect } from "effect"
import { HttpServerResponse } from "effect/http"
import { ConfigError } from "../config/config-error.ts"
import { WorkerError } from "../actors/node/worker.ts"
import { attempt, json, readJson, readText, type GatewayContext, type Handler } from "./call.ts"
import { ApiError, invalid } from "./errors.ts"
import { GatewayError } from "./gateway-error.ts"
import { StaleRevision, type TopologyAccess } from "./topology-access.ts"

const accessOf = ({ topology }: GatewayContext): TopologyAccess => {
  if (topology === undefined) throw new ApiError({ status: 404, type: "invalid_request_error", code: "no_topology_file", message: "this server follows no topology file; start it with npm start or penstock up" })
  return topology
}

const tagged = (revision: string): Readonly<Record<string, string>> => ({ etag: `"${revision}"` })

export const getTopology: Handler = (gateway, call) =>
  attempt(() => {
    const { text, ...state } = accessOf(gateway).state()
    if (/\byaml\b/.test(call.request.headers["accept"] ?? "")) return HttpServerResponse.text(text, { contentType: "application/yaml", headers: tagged(state.revision) })
    return json(200, { ...state, text }, tagged(state.revision))
  })

/** A topology is YAML, of which JSON is a part. Answers when it is accepted; what becomes of it is asked for by GET. */
export const putTopology: Handler = Effect.fnUntraced(function* (gateway, call) {
  const text = yield* readText(gateway, call)
  const header = call.request.headers["if-match"]?.trim()
  const ifRevision = header === undefined || header === "*" ? undefined : header.replace(/^W\//, "").replace(/^"(.*)"$/, "$1")
  const dryRun = /[?&]dryRun=(1|true)\b/.test(call.request.url)
  return yield* attempt(async () => {
    try {
      const { revision, plan } = await accessOf(gateway).put(text, { dryRun, ifRevision })
      return json(dryRun ? 200 : 202, { revision, plan }, dryRun ? {} : tagged(revision))
    } catch (error) {
      if (error instanceof StaleRevision) throw new ApiError({ status: 412, type: "invalid_request_error", code: "stale_revision", message: error.message, headers: tagged(error.current) })
      if (error instanceof ConfigError || error instanceof GatewayError) throw new ApiError({ status: 400, type: "invalid_request_error", code: "invalid_topology", message: error.message })
      throw error
    }
  })
})

export const drainWorker: Handler = Effect.fnUntraced(function* (gateway, call) {
  const received = yield* readJson(gateway, call)
  return yield* attempt(async () => {
    const { worker, undo = false } = (typeof received === "object" && received !== null ? received : {}) as { readonly worker?: unknown; readonly undo?: unknown }
    if (typeof worker !== "string") throw invalid("worker", "expected the name of a worker of the topology")
    if (typeof undo !== "boolean") throw invalid("undo", "expected true or false")
    try {
      await accessOf(gateway).drain(worker, undo)
    } catch (error) {
      if (error instanceof WorkerError) throw new ApiError({ status: 409, type: "invalid_request_error", code: "cannot_drain", message: error.message })
      throw error
    }
    return json(202, { worker, drained: !undo })
  })
})
