/** `up` as a process of its own, following a file that a test edits. */
import { renameSync, rmSync, writeFileSync } from "node:fs"
import { join } from "node:path"
import type { TopologyState } from "../../gateway/topology-access.ts"
import { runStart, writeTopology } from "./start-process.ts"
import { writeTinyModel } from "./tiny-model.ts"

export interface Recomposed {
  readonly url: string
  readonly folder: string
  readonly path: string
  readonly output: () => string
  readonly state: () => Promise<TopologyState>
  /** Puts a file in the old one's place, as editors do. */
  edit(text: string): void
  /** As `edit`, and waits for what becomes of it. */
  recompose(text: string): Promise<TopologyState>
  stop(): Promise<number | null>
}

/** The lines that every topology of a test has; `kv` in a folder of its own, a thread for each worker. */
export const topologyText = (lines: ReadonlyArray<string>, model = "tiny"): string => ["penstock: 1", `model: file:${model}.gguf`, "kvStore: { disk: { path: kv } }", ...lines, ""].join("\n")

/** `workers` by role: `{ p0: "prefill", w0: "prefill, decode" }`. */
export const workerLines = (workers: Readonly<Record<string, string>>, more = ""): ReadonlyArray<string> => [
  "workers:",
  ...Object.entries(workers).map(([name, roles]) => `  - { name: ${name}, roles: [${roles}], threads: 1, kv: { blocks: 1024${more} } }`),
]

export const spawned = "bus: { nats: { spawn: true } }"

export const startRecomposed = async (text: string, args: ReadonlyArray<string> = ["--port", "0"]): Promise<Recomposed> => {
  const { folder, path } = await writeTopology()
  await writeTinyModel(join(folder, "other.gguf"), { seed: 2 })
  writeFileSync(path, text)
  const { child, output, ended } = runStart(["--topology", path, ...args])
  const gone = ended.then((code) => {
    throw new Error(`it ended with ${code}: ${output()}`)
  })
  gone.catch(() => {})
  const ready = new Promise<string>((resolve) => {
    child.stdout!.on("data", () => {
      const address = /http:\/\/127\.0\.0\.1:\d+/.exec(output())
      if (address !== null && output().includes("ready")) resolve(address[0])
    })
  })
  const url = await Promise.race([ready, gone])
  const state = async () => (await (await fetch(`${url}/topology`)).json()) as TopologyState
  const edit = (next: string) => {
    writeFileSync(`${path}.new`, next)
    renameSync(`${path}.new`, path)
  }
  return {
    url,
    folder,
    path,
    output,
    state,
    edit,
    recompose: async (next) => {
      edit(next)
      for (;;) {
        const now = await Promise.race([state(), gone])
        if (now.text === next && now.state !== "changing") return now
        await new Promise((resolve) => setTimeout(resolve, 50))
      }
    },
    stop: async () => {
      if (child.exitCode === null) process.kill(-child.pid!, "SIGTERM")
      const code = await ended
      rmSync(folder, { recursive: true, force: true })
      return code
    },
  }
}
