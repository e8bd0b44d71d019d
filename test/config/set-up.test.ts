/** What a newcomer types, in processes of its own. */
import { spawnSync } from "node:child_process"
import { cpSync, mkdirSync, mkdtempSync, rmSync, statSync, symlinkSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { fileURLToPath } from "node:url"
import { afterAll, beforeAll, describe, expect, test } from "vitest"
import { programArguments } from "../../config/programs.mjs"

const root = fileURLToPath(new URL("../..", import.meta.url))
let scratch: string

const node = (args: ReadonlyArray<string>, options: { readonly cwd?: string; readonly env?: Readonly<Record<string, string>> } = {}) => {
  const { status, stdout, stderr } = spawnSync(process.execPath, args, {
    cwd: options.cwd ?? root, encoding: "utf8", timeout: 50_000, env: { ...process.env, PENSTOCK_HOME: join(scratch, "home"), ...options.env }
  })
  return { status, stdout, stderr }
}

const main = (...args: ReadonlyArray<string>) => node([...programArguments(join(root, "gateway", "main.ts")), ...args])

beforeAll(() => {
  scratch = mkdtempSync(join(tmpdir(), "penstock-set-up-"))
})

afterAll(() => rmSync(scratch, { recursive: true, force: true }))

describe("the command line", () => {
  test("help and version are on stdout", () => {
    expect(main("--help")).toMatchObject({ status: 0, stderr: "", stdout: expect.stringContaining("Usage: npm run -s penstock -- COMMAND") })
    expect(main("--version")).toMatchObject({ status: 0, stdout: expect.stringMatching(/^\d+\.\d+\.\d+\n$/) })
  })

  test.each([
    [["fly"], 'unknown command "fly"'],
    [[], "expected a command"],
    [["up", "--prt", "1"], "Unknown option '--prt'"],
    [["up", "--port", "99999"], '--port: expected a whole number in 0 … 65535, found "99999"'],
    [["up", "a", "b"], "up: expected one topology file"],
    [["pull"], "pull: expected one model"]
  ])("%j: usage and exit code 2", (args, message) => {
    const { status, stdout, stderr } = main(...args)
    expect({ status, stdout }).toEqual({ status: 2, stdout: "" })
    expect(stderr).toContain(message)
    expect(stderr).toContain("Usage:")
  })

  test("a mistake in a file or a variable is told without a stack", () => {
    const file = join(scratch, "typo.yaml")
    writeFileSync(file, "penstock: 1\nwrkers: []\n")
    expect(main("up", file)).toEqual({
      status: 1,
      stdout: "",
      stderr: "typo.yaml:2: wrkers: unknown key, did you mean workers?; allowed: penstock, cluster, model, bus, gateway, request, scheduler, workers, mixedKv, kvStore, telemetry\n"
    })
    expect(node([...programArguments(join(root, "gateway", "main.ts")), "up"], { env: { PENSTOCK_ISA: "sse" } })).toMatchObject({ status: 1, stderr: 'PENSTOCK_ISA: expected one of reference, avx2, avx512, found "sse"\n' })
    expect(main("pull", "file:/nowhere/m.gguf")).toMatchObject({ status: 1, stderr: expect.stringMatching(/^\/nowhere\/m\.gguf: no such file[^\n]*\n$/) })
  })
})

describe("set-up", () => {
  test("without CMake and a compiler it says which packages to install", () => {
    const clone = join(scratch, "clone")
    mkdirSync(clone)
    for (const name of ["config", "kernels", "package.json", "package-lock.json"]) cpSync(join(root, name), join(clone, name), { recursive: true })
    symlinkSync(join(root, "node_modules"), join(clone, "node_modules"))
    const { status, stdout, stderr } = node(["config/bootstrap.mjs", "build"], { cwd: clone, env: { PATH: "", CXX: "" } })
    expect({ status, stdout }).toEqual({ status: 1, stdout: "" })
    expect(stderr).toMatch(/^Penstock builds native kernels and needs CMake and a C\+\+ compiler/)
    expect(stderr).toMatch(/cmake/)
    expect(stderr).not.toMatch(/\n\s+at /)
  })

  test("with nothing to do it says nothing, and makes nothing anew", () => {
    node(["config/bootstrap.mjs", "build"])
    const made = () => ["kernels/penstock.node", "programs/gateway/main.js"].map((path) => statSync(join(root, "build", path)).mtimeMs)
    const before = made()
    expect(node(["config/bootstrap.mjs", "build"])).toEqual({ status: 0, stdout: "", stderr: "" })
    expect(made()).toEqual(before)
  })

  test("a program whose sources were edited since it was built runs from its sources", () => {
    const clone = join(scratch, "edited")
    mkdirSync(clone)
    for (const name of ["actors", "config", "gateway", "kernels", "package-lock.json"]) cpSync(join(root, name), join(clone, name), { recursive: true })
    symlinkSync(join(root, "node_modules"), join(clone, "node_modules"))
    const say = `import { buildPrograms, programArguments, programsDue } from "./config/programs.mjs"; console.log(programArguments(${JSON.stringify(join(clone, "actors", "node", "child.ts"))}).at(-1))`
    const argument = (before: string) => node(["--input-type=module", "-e", say.replace("; console", `; ${before}; console`)], { cwd: clone }).stdout.trim()
    expect(argument("")).toBe(join(clone, "actors", "node", "child.ts"))
    expect(argument("await buildPrograms(programsDue())")).toBe(join(clone, "build", "programs", "actors", "node", "child.js"))
    expect(argument("")).toBe(join(clone, "build", "programs", "actors", "node", "child.js"))
    writeFileSync(join(clone, "actors", "node", "progress.ts"), "// edited")
    expect(argument("")).toBe(join(clone, "actors", "node", "child.ts"))
  })
})
