/**
 * The programs of Penstock as single files: each entry point with all it imports, bundled by esbuild into build/programs.
 * A process of several hundred TypeScript files takes over two seconds of a core to load, a bundle a third of one; and how
 * soon a process serves is what a restart and a recomposition cost.
 *
 * Plain JavaScript, since the set-up uses it before anything is built.
 */
import { createHash } from "node:crypto"
import { existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import { dirname, join, relative, sep } from "node:path"
import { fileURLToPath, pathToFileURL } from "node:url"

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const folder = join(root, "build", "programs")
const stamp = join(folder, ".penstock-sources")
const sourceFolders = ["actors", "config", "gateway", "kernels"]

/** What runs as a process of its own: the command line, and every file that is named for it. */
const isProgram = (path) => path === join("gateway", "main.ts") || path === join("actors", "node", "child.ts") || path.endsWith("-process.ts") && path.startsWith(join("gateway", "bench"))

/** Relative to the root, sorted. */
const sources = () => {
  const found = []
  const walk = (at) => {
    for (const entry of readdirSync(join(root, at), { withFileTypes: true })) {
      const path = join(at, entry.name)
      if (entry.isDirectory()) walk(path)
      else if (/\.m?ts$|\.mjs$/.test(entry.name)) found.push(path)
    }
  }
  sourceFolders.forEach(walk)
  return found.sort()
}

/** Of the sources, the pinned packages and the place, since the bundles name it. */
const sourcesDigest = () => {
  const hash = createHash("sha256").update(`${root}\n`).update(readFileSync(join(root, "package-lock.json")))
  for (const path of sources()) hash.update(`${path}\n`).update(readFileSync(join(root, path)))
  return hash.digest("hex")
}

/** The digest of the sources where the programs have to be built, undefined where they are what the sources say. */
export const programsDue = () => {
  const digest = sourcesDigest()
  return existsSync(stamp) && readFileSync(stamp, "utf8") === digest ? undefined : digest
}

/** Sources find their data (models.yaml, presets, the addon) from `import.meta.url`; in a bundle that would be the bundle's place. */
const sourceUrls = {
  name: "source-urls",
  setup: (build) =>
    build.onLoad({ filter: /\.m?ts$|\.mjs$/ }, ({ path }) => {
      if (!sourceFolders.some((name) => path.startsWith(join(root, name) + sep))) return undefined
      const contents = readFileSync(path, "utf8").replace(/\bimport\.meta\.url\b/g, JSON.stringify(pathToFileURL(path).href))
      return { contents, loader: path.endsWith("ts") ? "ts" : "js" }
    }),
}

/** Bundles all programs. Rejects with what esbuild says where a source cannot be read. */
export const buildPrograms = async (digest) => {
  const { build } = await import("esbuild")
  rmSync(folder, { recursive: true, force: true })
  await build({
    absWorkingDir: root,
    entryPoints: sources().filter(isProgram),
    outbase: root,
    outdir: folder,
    bundle: true,
    splitting: true,
    platform: "node",
    format: "esm",
    target: "node20",
    sourcemap: "linked",
    logLevel: "error",
    external: ["esbuild"],
    define: { isBundle: "true" },
    plugins: [sourceUrls],
    // For packages that are CommonJS, which ask for Node's own modules by `require`.
    banner: { js: 'import { createRequire as createRequireOfBundle } from "node:module"\nconst require = createRequireOfBundle(import.meta.url)' },
  })
  writeFileSync(stamp, digest)
}

let built = typeof isBundle !== "undefined" // whether the programs are what the sources say; a bundle starts its like

/**
 * Node's arguments for a program, given the path of its source: the bundle, or, where a source was edited since it was built
 * (a test that is run by hand), the source itself.
 */
export const programArguments = (source) => {
  built ||= programsDue() === undefined
  const bundle = join(folder, relative(root, source)).replace(/\.ts$/, ".js")
  return built && existsSync(bundle) ? [bundle] : [...sourceArguments, source]
}

const [major = 0, minor = 0] = process.versions.node.split(".").map(Number)

/** Node's own arguments for a program in TypeScript, which it reads by itself from 22.18 on. */
export const sourceArguments = major > 22 || (major === 22 && minor >= 18) ? [] : ["--import", "tsx"]
