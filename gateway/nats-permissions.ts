/** The command `nats-permissions`: what each kind of process may do on a NATS server, as configuration of that server. */
import { join } from "node:path"
import { permissions, processKinds, type ProcessKind } from "../actors/messages/subjects.ts"
import { userKey } from "../actors/runtime/nats-user-key.ts"

export interface NatsPermissionsOptions {
  readonly cluster: string
  /** A folder with a seed for each kind, which are made where they are missing. Without it, a text takes the keys' place. */
  readonly keys?: string
}

interface NatsUser {
  readonly nkey: string
  readonly permissions: { readonly publish: ReadonlyArray<string>; readonly subscribe: ReadonlyArray<string> }
}

const meanings: Readonly<Record<ProcessKind, string>> = {
  gateway: "the process of `penstock up`: it may do what any actor does, since actors are embedded in it while the bus changes",
  request: "request actors",
  scheduler: "schedulers",
  worker: "prefill and decode workers",
  "kv-store": "KV stores",
  node: "agents of machines, which keep the wanted topology in JetStream",
}

/**
 * A user for each kind of process.
 * @throws ConfigError with one sentence where a key cannot be read or made
 */
export const natsUsers = ({ cluster, keys }: NatsPermissionsOptions): Readonly<Record<ProcessKind, NatsUser>> =>
  Object.fromEntries(
    processKinds.map((kind) => [kind, { nkey: keys === undefined ? `PUBLIC_KEY_OF_${kind.toUpperCase().replaceAll("-", "_")}` : userKey(join(keys, `${kind}.nk`)), permissions: permissions(cluster, kind) }]),
  ) as Record<ProcessKind, NatsUser>

/** As text for the configuration file of a nats-server. */
export const natsConfiguration = (options: NatsPermissionsOptions): string => {
  const { cluster, keys } = options
  const list = (name: string, subjects: ReadonlyArray<string>) => [`        ${name}: [`, ...subjects.map((subject) => `          ${JSON.stringify(subject)}`), "        ]"]
  const users = Object.entries(natsUsers(options)).flatMap(([kind, { nkey, permissions: { publish, subscribe } }]) => [
    `    # ${meanings[kind as ProcessKind]}`,
    `    { nkey: ${nkey}`,
    "      permissions: {",
    ...list("publish", publish),
    ...list("subscribe", subscribe),
    "      } }",
  ])
  const explained =
    keys === undefined
      ? ["Put a public key in place of each PUBLIC_KEY_OF_…: `nk -gen user -pubout` makes one with its seed, and", "`penstock nats-permissions --keys FOLDER` makes all of them and prints this with them in place.", "In the topology, with the seeds as FOLDER/gateway.nk and so on:"]
      : ["The seeds are in that folder, a file each; every process needs its own, and nobody else's. In the topology:"]
  const note = [
    `Who may do what in the Penstock cluster ${cluster}; for a nats-server's configuration file.`,
    ...explained,
    `  bus: { nats: { url: nats://HOST:4222, nkey: ${keys ?? "FOLDER"}/{role}.nk } }`,
  ]
  return [...note.map((line) => `# ${line}`), "authorization {", "  users: [", ...users, "  ]", "}", ""].join("\n")
}
