/** The flags of the commands of a cluster, checked. */
import { resolve } from "node:path"
import { readEnv } from "../config/env.ts"
import type { ModelSpec } from "../config/models.ts"
import { isNatsUrl, labelPattern, namePattern, type NatsAddress } from "../config/topology.ts"
import type { ResolvedModel } from "../actors/node/fetch-model.ts"
import { parsePort, UsageError } from "./usage-error.ts"

type Text = string | undefined

export interface ClusterFlags {
  readonly nats?: Text
  readonly cluster?: Text
  readonly name?: Text
  readonly labels?: Text
  readonly host?: Text
  readonly port?: Text
  readonly token?: Text
  readonly credentials?: Text
  readonly nkey?: Text
  readonly ca?: Text
  readonly cert?: Text
  readonly key?: Text
  readonly revision?: Text
  readonly gateway?: boolean | undefined
  readonly json?: boolean | undefined
  readonly "dry-run"?: boolean | undefined
  readonly undo?: boolean | undefined
}

/** The server that --nats names, and what it wants to see. */
const natsOf = (command: string, { nats: url, token, credentials, nkey, ca, cert, key }: ClusterFlags): NatsAddress => {
  if (url === undefined) throw new UsageError(`${command}: expected --nats URL`)
  const files = (paths: Readonly<Record<string, string | undefined>>) => Object.fromEntries(Object.entries(paths).flatMap(([name, path]) => (path === undefined ? [] : [[name, resolve(path)]])))
  const tls = files({ ca, cert, key })
  const secrets = files({ token, credentials, nkey })
  if (!isNatsUrl(url) || Object.keys(secrets).length > 1 || (cert === undefined) !== (key === undefined)) {
    throw new UsageError(`${command}: --nats: expected nats://HOST:PORT or tls://HOST:PORT, with one of --token, --credentials and --nkey at most, and --cert with --key`)
  }
  return { url, ...secrets, ...(Object.keys(tls).length === 0 ? {} : { tls }) }
}

const nameOf = (flag: string, found: string): string => {
  if (!namePattern.test(found)) throw new UsageError(`${flag}: expected a name of letters, digits, - and _ (at most 63), found "${found}"`)
  return found
}

const labelsOf = (text: string | undefined): Readonly<Record<string, string>> =>
  Object.fromEntries(
    (text ?? "").split(",").filter((label) => label !== "").map((label) => {
      const [name = "", value = "", ...more] = label.split("=")
      if (more.length > 0 || !labelPattern.test(name) || !labelPattern.test(value)) throw new UsageError(`--labels: expected name=text, …, each of letters, digits, ., - and _ (at most 63), found "${label}"`)
      return [name, value]
    }),
  )

/** Runs a command of a cluster. Resolves to the exit code. */
export const onCluster = async (
  command: "node" | "apply" | "status" | "drain",
  [first, ...more]: ReadonlyArray<string>,
  values: ClusterFlags,
  fetchModel: (spec: ModelSpec) => Promise<ResolvedModel>,
): Promise<number> => {
  const nats = natsOf(command, values)
  const cluster = nameOf("--cluster", values.cluster ?? "main")
  const env = readEnv()
  const takesOne = command === "apply" || command === "drain"
  if (more.length > 0 || (first === undefined) === takesOne) throw new UsageError(`${command}: expected ${command === "apply" ? "one topology file" : command === "drain" ? "the name of a node or a worker" : "no more than flags"}`)
  if (command === "node") {
    if (values.name === undefined) throw new UsageError("node: expected --name NAME, which no other node of the cluster has")
    if (values.gateway !== true && (values.host ?? values.port) !== undefined) throw new UsageError("node: --host and --port belong to --gateway")
    const { runNode } = await import("./node.ts")
    const overrides = { host: values.host, port: parsePort(values.port) ?? env.port }
    return runNode({ name: nameOf("--name", values.name), labels: labelsOf(values.labels), cluster, nats, env, overrides, gateway: values.gateway === true, fetchModel })
  }
  if (command === "status") return (await import("./cluster-status.ts")).showCluster({ cluster, nats, json: values.json === true })
  const commands = await import("./cluster-commands.ts")
  if (command === "drain") return commands.drainInCluster({ cluster, nats, name: first!, undo: values.undo === true })
  const { revision } = values
  if (revision !== undefined && !/^\d{1,15}$/.test(revision)) throw new UsageError(`--revision: expected the revision that status shows, found "${revision}"`)
  const { loadTopology } = await import("../config/load-topology.ts")
  const loaded = loadTopology(first!)
  return commands.applyToCluster({ cluster: values.cluster ?? loaded.topology.cluster, nats, text: loaded.text, path: loaded.path, dryRun: values["dry-run"] === true, ifRevision: revision === undefined ? undefined : Number(revision) })
}
