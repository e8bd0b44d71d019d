/** The process of OpenVINO GenAI under `bench kernels`: a Python program that answers lines of JSON. */
import { spawn, spawnSync } from "node:child_process"
import { createInterface } from "node:readline"
import { fileURLToPath } from "node:url"
import { Effect, type Scope } from "effect"
import type { KernelsOrder, KernelsReport } from "./kernels-order.ts"
import { BenchError, type Peer, type Report } from "./peer.ts"

const version = "2026.4.1.0"
const program = fileURLToPath(new URL("./openvino-peer.py", import.meta.url))
const environment = fileURLToPath(new URL("../../build/openvino", import.meta.url))
const defaultPython = `${environment}/bin/python`

const missing = (python: string): BenchError =>
  new BenchError(
    `OpenVINO GenAI was not found by ${python}. It is no dependency of Penstock; install it with\n` +
      `  python3 -m venv build/openvino && build/openvino/bin/pip install openvino-genai==${version}\n` +
      "or set PENSTOCK_OPENVINO_PYTHON to the python of an environment that has it.",
  )

/** Runs until the Scope closes. */
export const openVino = (python: string = defaultPython): Effect.Effect<Peer<KernelsOrder, KernelsReport>, BenchError, Scope.Scope> =>
  Effect.gen(function* () {
    if (spawnSync(python, ["-c", "import importlib.util as u, sys; sys.exit(u.find_spec('openvino_genai') is None)"], { stdio: "ignore" }).status !== 0) return yield* Effect.fail(missing(python))
    const child = yield* Effect.acquireRelease(
      Effect.sync(() => spawn(python, [program], { stdio: ["pipe", "pipe", "inherit"] })),
      (started) =>
        Effect.callback<void>((resume) => {
          if (started.exitCode !== null || started.signalCode !== null) return resume(Effect.void)
          started.once("exit", () => resume(Effect.void))
          started.kill("SIGKILL") // it holds nothing but memory
        }),
    )
    const lines = createInterface({ input: child.stdout })
    return {
      pid: child.pid,
      ask: (order) =>
        new Promise<KernelsReport>((resolve, reject) => {
          const gone = () => reject(new BenchError("OpenVINO's process ended"))
          child.once("exit", gone)
          lines.once("line", (line) => {
            child.off("exit", gone)
            const report = JSON.parse(line) as Report<KernelsReport>
            if (report.type === "done") resolve(report.value)
            else reject(new BenchError(report.message))
          })
          child.stdin.write(`${JSON.stringify(order)}\n`)
        }),
    }
  })
