/**
 * `npm run test:sanitize`: the kernels under GCC's sanitizers.
 *
 * - AddressSanitizer and UndefinedBehaviorSanitizer: the addon as it is, under the tests in test/kernels.
 * - ThreadSanitizer, which cannot watch Node: races.cc, which drives everything below it from several threads.
 *
 * Any report is a failure. The last line is `N passed, N failed`; with `--after FILE` the counts in that file are added.
 */
import { spawnSync } from "node:child_process"
import { mkdirSync, readFileSync, realpathSync, rmSync } from "node:fs"
import { isAbsolute, join } from "node:path"
import { fileURLToPath } from "node:url"
import { closingLine, type Counts } from "../support/closing-line-reporter.ts"
import { writeTinyModel, type TinyModelOptions } from "../support/tiny-model.ts"

const root = fileURLToPath(new URL("../..", import.meta.url))
const folder = join(root, "build", "sanitize")
const deadlineMs = 15 * 60_000

/** Ends with one message, and a closing line that says that nothing was found to be right. */
const giveUp = (message: string): never => {
  process.stdout.write(`${message}\n${closingLine({ passed: 0, failed: 1 })}`)
  process.exit(1)
}

const run = (program: string, args: ReadonlyArray<string>, env: Readonly<Record<string, string>> = {}) =>
  spawnSync(program, args, { cwd: root, env: { ...process.env, ...env }, encoding: "utf8", maxBuffer: 2 ** 28, timeout: deadlineMs })

/** The path of a library that the compiler links; undefined where it has none. */
const library = (compiler: string, name: string): string | undefined => {
  const path = run(compiler, [`-print-file-name=${name}`]).stdout?.trim() ?? ""
  return isAbsolute(path) ? realpathSync(path) : undefined
}

const build = (compiler: string, sanitizer: "address" | "thread", target: string): void => {
  process.stdout.write(`Building ${target} with ${sanitizer === "address" ? "AddressSanitizer and UndefinedBehaviorSanitizer" : "ThreadSanitizer"} …\n`)
  const generator = run("ninja", ["--version"]).status === 0 ? ["-G", "Ninja"] : []
  const options = [`-DCMAKE_CXX_COMPILER=${compiler}`, "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1 -g1", `-DPENSTOCK_SANITIZE=${sanitizer}`]
  for (const args of [["-S", "kernels", "-B", join(folder, sanitizer), ...generator, ...options], ["--build", join(folder, sanitizer), "--target", target, "--parallel"]]) {
    const { status, stdout, stderr } = run("cmake", args)
    if (status !== 0) giveUp(`${stdout}${stderr}cmake ${args.join(" ")} failed`)
  }
}

/** Tests of the addon in Node, whose own memory no sanitizer follows: leaks are not looked for. */
const underNode = (compiler: string): Counts => {
  const runtime = [library(compiler, "libasan.so"), library(compiler, "libstdc++.so")].join(" ")
  const file = join(folder, "counts.json")
  rmSync(file, { force: true })
  const { status, stdout, stderr } = run(process.execPath, [join(root, "node_modules", "vitest", "vitest.mjs"), "run", "--config", "test/sanitize/vitest.config.ts"], {
    LD_PRELOAD: runtime,
    ASAN_OPTIONS: "detect_leaks=0",
    UBSAN_OPTIONS: "print_stacktrace=1",
  })
  let counts: Counts = { passed: 0, failed: 0 }
  try {
    counts = JSON.parse(readFileSync(file, "utf8")) as Counts
  } catch {
    // The run ended before its end, which its exit status says.
  }
  const clean = status === 0 && counts.failed === 0 && counts.passed > 0 && !/Sanitizer|runtime error:/.test(stdout + stderr)
  if (!clean) process.stdout.write(`${stdout}${stderr}`)
  return clean ? counts : { passed: counts.passed, failed: Math.max(1, counts.failed) }
}

const models: Readonly<Record<string, TinyModelOptions>> = {
  mixed: { types: { token_embd: "Q8_0", attn_q: "Q4_0", attn_k: "Q8_0", attn_v: "F16", attn_output: "Q4_1", ffn_gate: "Q4_1", ffn_up: "F32", ffn_down: "Q8_0" }, vocabulary: 307 },
  wide: { types: "Q4_1", heads: 3, kvHeads: 1, headDim: 64, layers: 3, tied: false },
  super: { types: { token_embd: "Q4_K", output: "Q6_K", attn_q: "Q4_K", attn_k: "Q5_K", attn_v: "Q6_K", attn_output: "BF16", ffn_gate: "Q4_K", ffn_up: "Q5_0", ffn_down: "Q5_1" }, hidden: 256, heads: 4, kvHeads: 2, headDim: 64, ffn: 256, layers: 1, tied: false },
}

const ofThreads = async (): Promise<Counts> => {
  const paths: Array<string> = []
  for (const [name, options] of Object.entries(models)) {
    paths.push(join(folder, `${name}.gguf`))
    await writeTinyModel(paths.at(-1)!, options)
  }
  const program = join(folder, "thread", "penstock-races")
  let ended = run(program, paths)
  // Where addresses are spread further than ThreadSanitizer can follow, without that.
  if (ended.stderr.includes("unexpected memory mapping")) ended = run("setarch", ["-R", program, ...paths])
  const passed = ended.stdout.match(/^ok /gm)?.length ?? 0
  const failed = ended.stdout.match(/^FAILED /gm)?.length ?? 0
  const clean = ended.status === 0 && failed === 0 && passed > 0 && !ended.stderr.includes("ThreadSanitizer")
  if (!clean) process.stdout.write(`${ended.stdout}${ended.stderr}`)
  return clean ? { passed, failed } : { passed, failed: Math.max(1, failed) }
}

const [flag, file] = process.argv.slice(2)
if (flag !== undefined && (flag !== "--after" || file === undefined)) giveUp(`test:sanitize: expected nothing or --after FILE, found ${flag}`)
const before = file === undefined ? undefined : (JSON.parse(readFileSync(file, "utf8")) as Counts)
const compilers = [process.env["CXX"], "g++", "c++"].filter((name) => name !== undefined && name !== "") as ReadonlyArray<string>
const compiler = compilers.find((name) => ["libasan.so", "libubsan.so", "libtsan.so"].every((runtime) => library(name, runtime) !== undefined))
if (process.platform !== "linux" || compiler === undefined) {
  giveUp("test:sanitize needs Linux and GCC with its sanitizers (libasan, libubsan, libtsan), not found here: apt-get install g++, or set CXX")
} else {
  mkdirSync(folder, { recursive: true })
  build(compiler, "thread", "penstock-races")
  const threads = await ofThreads()
  process.stdout.write(`ThreadSanitizer: ${closingLine(threads)}`)
  build(compiler, "address", "penstock")
  const addresses = underNode(compiler)
  process.stdout.write(`AddressSanitizer and UndefinedBehaviorSanitizer: ${closingLine(addresses)}`)
  if (before !== undefined) process.stdout.write(`Tests before: ${closingLine(before)}`)
  const all = [threads, addresses, ...(before === undefined ? [] : [before])]
  process.stdout.write(closingLine({ passed: all.reduce((sum, { passed }) => sum + passed, 0), failed: all.reduce((sum, { failed }) => sum + failed, 0) }))
  process.exitCode = threads.failed + addresses.failed === 0 ? 0 : 1
}
