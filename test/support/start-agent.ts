/** Nodes of a cluster as processes of their own, each with its own PENSTOCK_HOME, and the commands of its operator. */
import { spawn, spawnSync, type ChildProcess } from "node:child_process"
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { ClusterControl, type ClusterStatus } from "../../actors/cluster/cluster-control.ts"
import { inboxPrefix, nodesNamespace, topologyBucket } from "../../actors/messages/subjects.ts"
import { Members } from "../../actors/presence/members.ts"
import { NatsBucket } from "../../actors/runtime/nats-bucket.ts"
import { NatsBus } from "../../actors/runtime/nats-bus.ts"
import { limits } from "../../config/limits.ts"
import { programArguments } from "../../config/programs.mjs"
import { natsOfRole, type NatsAddress } from "../../config/topology.ts"
import { testScope } from "./scoped.ts"
import { startConfiguredNats } from "./start-nats.ts"
import { writeTinyModel } from "./tiny-model.ts"

const main = join(import.meta.dirname, "..", "..", "gateway", "main.ts")

export interface StartedAgent {
  readonly child: ChildProcess
  readonly output: () => string
  /** Resolves with what the pattern has found in the output. */
  said(pattern: RegExp): Promise<RegExpExecArray>
  end(signal?: NodeJS.Signals): Promise<void>
}

export interface Said {
  readonly code: number | null
  readonly out: string
  readonly err: string
}

/** A nats-server with JetStream and a folder with a tiny model. */
export class AgentCluster {
  readonly folder: string
  /** How the commands reach the server. */
  readonly #natsFlags: ReadonlyArray<string>
  readonly control: ClusterControl
  readonly #stopAll: () => Promise<void>
  readonly #agents = new Set<StartedAgent>()

  private constructor(folder: string, natsFlags: ReadonlyArray<string>, control: ClusterControl, stopAll: () => Promise<void>) {
    this.folder = folder
    this.#natsFlags = natsFlags
    this.control = control
    this.#stopAll = stopAll
  }

  /** @param at a server that the test has started; absent: one without users */
  static async start(at?: NatsAddress): Promise<AgentCluster> {
    const folder = mkdtempSync(join(tmpdir(), "penstock-nodes-"))
    await writeTinyModel(join(folder, "tiny.gguf"), { context: 4096 })
    const nats = at === undefined ? await startConfiguredNats([`jetstream: { store_dir: ${JSON.stringify(join(folder, "js"))} }`]) : undefined
    const address: NatsAddress = at ?? { url: nats!.url }
    const { url, tls, ...files } = address
    const natsFlags = ["--nats", url, ...Object.entries({ ...files, ...tls }).flatMap(([name, path]) => (path === undefined ? [] : [`--${name}`, path]))]
    const user = natsOfRole(address, "node")
    const scope = testScope()
    const inbox = inboxPrefix("main.all", "node", "tests")
    const bucket = await NatsBucket.connect({ ...user, name: "tests", bucket: topologyBucket("main"), inboxPrefix: inbox })
    const bus = await NatsBus.connect({ ...user, name: "tests", inboxPrefix: inbox })
    const nodes = await scope.start(Members.listen(bus, nodesNamespace("main"), limits.nodeLossMs))
    return new AgentCluster(folder, natsFlags, new ClusterControl("main", bucket, nodes), async () => {
      await scope.close()
      await bus.close()
      await bucket.close()
      await nats?.stop()
    })
  }

  /** A topology file of the tiny model; `extra` are lines of it. */
  file(name: string, ...extra: ReadonlyArray<string>): string {
    const path = join(this.folder, name)
    writeFileSync(path, ["penstock: 1", `model: file:${join(this.folder, "tiny.gguf")}`, "gateway: { port: 0 }", ...extra, ""].join("\n"))
    return path
  }

  async agent(name: string, ...flags: ReadonlyArray<string>): Promise<StartedAgent> {
    const args = [...programArguments(main), "node", ...this.#natsFlags, "--name", name, ...flags]
    const child = spawn(process.execPath, args, { stdio: ["ignore", "pipe", "pipe"], env: { ...process.env, PENSTOCK_HOME: join(this.folder, `home-${name}`), PENSTOCK_THREADS: "1" } })
    let output = ""
    for (const stream of [child.stdout, child.stderr]) stream.on("data", (chunk: Buffer) => (output += chunk.toString()))
    const ended = new Promise<void>((resolve) => child.once("exit", () => resolve()))
    const agent: StartedAgent = {
      child,
      output: () => output,
      said: async (pattern) => {
        for (;;) {
          const found = pattern.exec(output)
          if (found !== null) return found
          if (child.exitCode !== null || child.signalCode !== null) throw new Error(`${name} has ended: ${output}`)
          await new Promise((resolve) => setTimeout(resolve, 20))
        }
      },
      end: async (signal = "SIGTERM") => {
        child.kill(signal)
        await ended
        this.#agents.delete(agent)
      },
    }
    this.#agents.add(agent)
    await agent.said(/is part of the cluster/)
    return agent
  }

  run(...args: ReadonlyArray<string>): Promise<Said> {
    const child = spawn(process.execPath, [...programArguments(main), ...args, ...this.#natsFlags], { stdio: ["ignore", "pipe", "pipe"] })
    let [out, err] = ["", ""]
    child.stdout.on("data", (chunk: Buffer) => (out += chunk.toString()))
    child.stderr.on("data", (chunk: Buffer) => (err += chunk.toString()))
    return new Promise((resolve) => child.once("close", (code) => resolve({ code, out, err })))
  }

  async until(holds: (status: ClusterStatus) => boolean): Promise<ClusterStatus> {
    for (;;) {
      const status = await this.control.status()
      if (holds(status)) return status
      await new Promise((resolve) => setTimeout(resolve, 50))
    }
  }

  /** Process ids of the components that the agents of this test have written down, by node, kind and id. */
  processes(): ReadonlyMap<string, number> {
    const found = new Map<string, number>()
    for (const home of readdirSync(this.folder).filter((name) => name.startsWith("home-"))) {
      const node = home.slice("home-".length)
      const folder = join(this.folder, home, "run", "main", node)
      for (const file of readdirSync(folder).filter((name) => name.endsWith(".json"))) {
        const { pid, planned } = JSON.parse(readFileSync(join(folder, file), "utf8")) as { readonly pid: number; readonly planned: { readonly kind: string; readonly id: string } }
        found.set(`${node} ${planned.kind} ${planned.id}`, pid)
      }
    }
    return found
  }

  async stop(): Promise<void> {
    const left = this.processes()
    await Promise.all([...this.#agents].map((agent) => agent.end())) // one that is alone leaves at once
    for (const pid of left.values()) if (spawnSync("kill", ["-0", String(pid)]).status === 0) process.kill(pid, "SIGKILL")
    await this.#stopAll()
    rmSync(this.folder, { recursive: true, force: true })
  }
}
