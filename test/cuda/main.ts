/**
 * `npm run test:cuda`: everything of the device that can be tested here.
 *
 * - nvcc compiles the addon for sm_80, sm_90 and PTX. The compiler is fetched where there is none; without one this fails.
 * - The kernels, through the shim, against plain loops, and the host's code against a driver that is not there (*.cc), with
 *   AddressSanitizer and UndefinedBehaviorSanitizer.
 * - The engine from end to end on the device of the host's (*.test.ts).
 * - Where there is a GPU, both of them on it too.
 *
 * The last line is `N passed, N failed`. What has passed with the same sources and compilers is not run again; with `--after FILE`
 * the counts in that file are added, and the sum is written to it.
 */
import { spawnSync } from "node:child_process"
import { mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import { dirname, join } from "node:path"
import { fileURLToPath } from "node:url"
import { buildTargets, CudaBuildError, fetchToolkit, hasGpu, sourcesDigest } from "../../config/cuda-build.mjs"
import { readEnv } from "../../config/env.ts"
import { closingLine, type Counts } from "../support/closing-line-reporter.ts"
import { writeTinyModel } from "../support/tiny-model.ts"

const root = fileURLToPath(new URL("../..", import.meta.url))
const folder = join(root, "build", "cuda")
const deadlineMs = 15 * 60_000
const say = (text: string): void => void process.stdout.write(`${text}\n`)

const run = (program: string, args: ReadonlyArray<string>, env: Readonly<Record<string, string>> = {}) =>
  spawnSync(program, args, { cwd: root, env: { ...process.env, ...env }, encoding: "utf8", maxBuffer: 2 ** 28, timeout: deadlineMs })

const sum = (all: ReadonlyArray<Counts>): Counts => ({ passed: all.reduce((total, { passed }) => total + passed, 0), failed: all.reduce((total, { failed }) => total + failed, 0) })

/** Counts of a program of check.cc; a crash counts as a failure. */
const ofProgram = (name: string, env: Readonly<Record<string, string>>): Counts => {
  const { status, signal, stdout, stderr } = run(join(folder, name), [], env)
  const passed = stdout.match(/^ok /gm)?.length ?? 0
  const failed = stdout.match(/^FAILED /gm)?.length ?? 0
  const clean = status === 0 && failed === 0 && passed > 0 && !/Sanitizer|runtime error:/.test(stderr)
  if (!clean) say(`${stdout.replaceAll(/^ok .*\n/gm, "")}${stderr}${name} ended with ${signal ?? status}`)
  return { passed, failed: clean ? 0 : Math.max(1, failed) }
}

/** Counts of the tests of the engine. */
const ofEngine = (addon: string, env: Readonly<Record<string, string>> = {}): Counts => {
  const file = join(folder, "counts.json")
  rmSync(file, { force: true })
  const { status, stdout, stderr } = run(process.execPath, [join(root, "node_modules", "vitest", "vitest.mjs"), "run", "--config", "test/cuda/vitest.config.ts"], { PENSTOCK_CUDA_ADDON: join(folder, addon), ...env })
  let counts: Counts = { passed: 0, failed: 0 }
  try {
    counts = JSON.parse(readFileSync(file, "utf8")) as Counts
  } catch {
    // The run ended before its end, which its exit status says.
  }
  const clean = status === 0 && counts.failed === 0 && counts.passed > 0
  if (!clean) say(`${stdout}${stderr}`)
  return { passed: counts.passed, failed: clean ? 0 : Math.max(1, counts.failed) }
}

const tell = (what: string, counts: Counts): Counts => {
  process.stdout.write(`${what}: ${closingLine(counts)}`)
  return counts
}

const runAll = async (gpu: boolean, toolkit: NonNullable<ReturnType<typeof fetchToolkit>>): Promise<Counts> => {
  say(`Compiling with nvcc ${toolkit.version} (${toolkit.from}) for sm_80, sm_90 and PTX, and with the shim …`)
  buildTargets(toolkit, ["penstock-shim", "penstock-cuda-shim", "penstock-cuda", ...(gpu ? ["penstock-cuda-gpu"] : [])])
  const all = [tell("nvcc", { passed: 1, failed: 0 })]
  const model = join(folder, "tiny.gguf")
  await writeTinyModel(model, { types: "Q4_0", layers: 2 })
  all.push(tell("Kernels through the shim, and the driver that is not there", ofProgram("penstock-cuda-shim", { PENSTOCK_TEST_MODEL: model, ASAN_OPTIONS: "detect_leaks=0:detect_stack_use_after_return=0", UBSAN_OPTIONS: "print_stacktrace=1" })))
  all.push(tell("The engine on the device of the host's", ofEngine("penstock-shim.node")))
  if (gpu) {
    all.push(tell("Kernels on the GPU", ofProgram("penstock-cuda-gpu", {})))
    all.push(tell("The engine on the GPU", ofEngine("penstock-cuda.node", { PENSTOCK_TEST_GPU: "1" })))
  }
  return sum(all)
}

/** What has passed before with the same digest. */
const cached = (file: string): Counts | undefined => {
  try {
    const counts = JSON.parse(readFileSync(file, "utf8")) as Counts
    return counts.passed > 0 && counts.failed === 0 ? counts : undefined
  } catch {
    return undefined
  }
}

const main = async (): Promise<Counts> => {
  const gpu = hasGpu()
  const toolkit = fetchToolkit(say)
  const digest = sourcesDigest(toolkit, ["kernels", "gateway/import", "test/cuda", "test/support", "test/fixtures", "config/cuda-build.mjs", "package-lock.json"])
  const file = join(readEnv().home, "cuda", "results", `${digest}${gpu ? "-gpu" : ""}.json`)
  const before = cached(file)
  if (before !== undefined) return tell(`The same sources and compilers have passed before (${file})`, before)
  const counts = await runAll(gpu, toolkit)
  if (counts.failed === 0) {
    mkdirSync(dirname(file), { recursive: true })
    writeFileSync(file, JSON.stringify(counts))
  }
  return counts
}

const [flag, after] = process.argv.slice(2)
let counts: Counts = { passed: 0, failed: 1 }
try {
  if (flag !== undefined && (flag !== "--after" || after === undefined)) throw new CudaBuildError(`test:cuda: expected nothing or --after FILE, found ${flag}`)
  counts = await main()
} catch (error) {
  say(error instanceof CudaBuildError ? error.message : String((error as Error).stack))
}
process.exitCode = counts.failed === 0 ? 0 : 1
if (after !== undefined) {
  counts = sum([counts, JSON.parse(readFileSync(after, "utf8")) as Counts])
  writeFileSync(after, JSON.stringify(counts))
}
process.stdout.write(closingLine(counts))
