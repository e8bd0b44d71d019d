/**
 * A Jaeger binary on this machine: PENSTOCK_JAEGER, PATH, the cache in PENSTOCK_HOME/bin, or one that is built into that
 * cache from Go modules, which takes about five minutes once. Its page has no assets then: only its API is of use.
 */
import { execFileSync } from "node:child_process"
import { accessSync, constants, copyFileSync, mkdirSync, mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { childEnv, readEnv } from "../../config/env.ts"

const goModule = "github.com/jaegertracing/jaeger"
const version = "v1.76.0"

const isProgram = (path: string): boolean => {
  try {
    accessSync(path, constants.X_OK)
    return true
  } catch {
    return false
  }
}

export const findJaeger = (): string => {
  const { home, jaeger, searchPath } = readEnv()
  const cached = join(home, "bin", `jaeger-${version}`)
  const found = [jaeger ?? "", ...searchPath.map((folder) => join(folder, "jaeger")), cached].find(isProgram)
  if (found !== undefined) return found
  if (!searchPath.some((folder) => isProgram(join(folder, "go")))) throw new Error("there is neither jaeger nor go on the PATH: name a binary in PENSTOCK_JAEGER, or install one of them")
  mkdirSync(join(home, "bin"), { recursive: true })
  build(cached)
  return cached
}

/** `go install` refuses a module with replace directives: a module of our own takes them over, with Jaeger's own checksums. */
const build = (into: string): void => {
  process.stderr.write(`Building Jaeger ${version} from Go modules, which takes about five minutes, once …\n`)
  const folder = mkdtempSync(join(tmpdir(), "penstock-jaeger-"))
  const go = (...args: ReadonlyArray<string>): string =>
    execFileSync("go", args, { cwd: folder, encoding: "utf8", env: childEnv({ GOFLAGS: "-mod=mod" }), stdio: ["ignore", "pipe", "inherit"], maxBuffer: 1 << 24 })
  try {
    const { Dir: source } = JSON.parse(go("mod", "download", "-json", `${goModule}@${version}`)) as { readonly Dir: string }
    const original = readFileSync(join(source, "go.mod"), "utf8").split("\n")
    const kept = original.filter((line) => /^(go |replace )/.test(line))
    writeFileSync(join(folder, "go.mod"), ["module jaegerbuild", ...kept, `require ${goModule} ${version}`, ""].join("\n"))
    copyFileSync(join(source, "go.sum"), join(folder, "go.sum"))
    execFileSync("chmod", ["u+w", join(folder, "go.sum")])
    go("get", "-tool", `${goModule}/cmd/jaeger@${version}`)
    go("build", "-ldflags", "-s -w", "-o", `${into}.new`, `${goModule}/cmd/jaeger`)
    renameSync(`${into}.new`, into)
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}
