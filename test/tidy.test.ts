/** Style that a formatter cannot keep. */
import { existsSync, readdirSync, readFileSync } from "node:fs"
import { fileURLToPath } from "node:url"
import { expect, test } from "vitest"

const root = fileURLToPath(new URL("..", import.meta.url))
const elsewhere = new Set(["node_modules", "build", ".git", ".cache"])
const filesIn = (folder: string): ReadonlyArray<string> =>
  readdirSync(`${root}/${folder}`, { withFileTypes: true }).flatMap((entry) => {
    const path = folder === "" ? entry.name : `${folder}/${entry.name}`
    if (entry.isDirectory()) return elsewhere.has(entry.name) ? [] : filesIn(path)
    return entry.isFile() ? [path] : []
  })
const files = filesIn("")
const self = "test/tidy.test.ts"
const sources = files.filter((path) => /\.(ts|mjs|mts)$/.test(path) && path !== self)

/** `file:line` of every line that matches. */
const lines = (paths: ReadonlyArray<string>, pattern: RegExp): ReadonlyArray<string> =>
  paths.flatMap((path) => readFileSync(`${root}/${path}`, "utf8").split("\n").flatMap((line, index) => (pattern.test(line) ? [`${path}:${index + 1}: ${line.trim()}`] : [])))

test("subjects are built in one place", () => {
  expect(lines(sources.filter((path) => path !== "actors/messages/subjects.ts" && !path.startsWith("test/")), /["'`]ps\./)).toEqual([])
})

test("process.env is read in config/ only", () => {
  expect(lines(sources.filter((path) => !path.startsWith("config/") && !path.startsWith("test/")), /process\.env/)).toEqual([])
})

test("nothing is of type any", () => {
  expect(lines(sources.filter((path) => path.endsWith("ts")), /(: ?|\bas |<|, |\| )any\s*([;,)=>\]}|&[]|$)/)).toEqual([])
})

test("no marker of work left undone", () => {
  expect(lines([...sources, ...files.filter((path) => /\.(cc|h|cu|txt|yaml|md)$/.test(path))], /\b(TODO|FIXME|XXX)\b/)).toEqual([])
})

test("imports flow downward: config and kernels know nothing of the actors, actors nothing of the gateway", () => {
  const outside = (folder: string, forbidden: RegExp) => lines(sources.filter((path) => path.startsWith(folder)), forbidden)
  expect(outside("config/", /from "\.\.\/|import\("\.\.\//)).toEqual([])
  expect(outside("kernels/", /from "\.\.\/(actors|gateway|config)/)).toEqual([])
})

test("files are named in kebab-case", () => {
  expect(sources.filter((path) => !/^[a-z0-9-]+(\.(config|test|d))?\.(ts|mjs|mts)$/.test(path.split("/").at(-1) ?? ""))).toEqual([])
})

test("commands in the README exist", () => {
  const readme = `${root}/README.md`
  expect(existsSync(readme), "README.md").toBe(true)
  const { scripts } = JSON.parse(readFileSync(`${root}/package.json`, "utf8")) as { readonly scripts: Readonly<Record<string, string>> }
  const known = [...Object.keys(scripts), "install", "ci", "i"]
  const text = readFileSync(readme, "utf8")
  const used = [...text.matchAll(/npm run (?:-s )?([a-z:-]+)/g), ...text.matchAll(/npm (start|test|ci|install)\b/g)].map((match) => match[1] ?? "")
  expect(used.filter((name) => !known.includes(name))).toEqual([])
})
