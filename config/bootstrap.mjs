/**
 * Behind every npm script: makes a fresh clone runnable (packages, native addon, programs), then runs what was asked for.
 *
 * Plain JavaScript without dependencies, because it runs before node_modules exists. What it says goes to stderr, so
 * that stdout stays the command's own. With nothing to do it costs a few milliseconds, and the command runs in this very
 * process: signals, exit code and messages are its own.
 */
import { spawn, spawnSync } from "node:child_process"
import { createHash } from "node:crypto"
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import { availableParallelism, totalmem } from "node:os"
import { dirname, join, relative } from "node:path"
import { fileURLToPath, pathToFileURL } from "node:url"
import { buildPrograms, programArguments, programsDue, sourceArguments } from "./programs.mjs"

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const at = (...parts) => join(root, ...parts)
const say = (text) => process.stderr.write(`${text}\n`)

/** The operator can mend it: one message, no stack. */
class Remedy extends Error {}

const atLeast = (major, minor) => {
  const [hasMajor = 0, hasMinor = 0] = process.versions.node.split(".").map(Number)
  return hasMajor > major || (hasMajor === major && hasMinor >= minor)
}

const checkNode = () => {
  if (!atLeast(20, 19)) throw new Remedy(`Penstock needs Node.js 20.19 or newer; this is ${process.versions.node}. Install a newer one, for instance with nvm install 22.`)
}

const read = (path) => {
  try {
    return readFileSync(path, "utf8")
  } catch {
    return undefined
  }
}

/** Runs a program to its end. Its output is kept, and shown only by a failure; `onLine` sees every line. */
const runQuietly = (program, args, onLine) =>
  new Promise((resolve, reject) => {
    const child = spawn(program, args, { cwd: root, stdio: ["ignore", "pipe", "pipe"], shell: process.platform === "win32" })
    let output = ""
    const keep = (chunk) => {
      const text = chunk.toString("utf8")
      output = (output + text).slice(-200_000)
      for (const line of text.split("\n")) if (line.trim() !== "") onLine?.(line)
    }
    child.stdout.on("data", keep)
    child.stderr.on("data", keep)
    child.on("error", reject)
    child.on("close", (code) => resolve({ code, output }))
  })

// --- packages ---

const packagesStamp = at("node_modules", ".penstock-lock")

/** Whether what npm wrote down about node_modules is what the lock file pins, for who ran npm by hand. */
const installedByHand = (lock) => {
  const installed = read(at("node_modules", ".package-lock.json"))
  if (installed === undefined) return false
  try {
    const wanted = JSON.parse(lock).packages
    const found = JSON.parse(installed).packages
    return Object.entries(wanted).every(([path, entry]) =>
      path === "" || entry.optional === true || entry.devOptional === true || (found[path]?.version === entry.version && found[path]?.integrity === entry.integrity))
  } catch {
    return false
  }
}

const packagesDue = () => {
  const lock = readFileSync(at("package-lock.json"), "utf8")
  const digest = createHash("sha256").update(lock).digest("hex")
  if (read(packagesStamp) === digest) return undefined
  if (installedByHand(lock)) {
    writeFileSync(packagesStamp, digest)
    return undefined
  }
  return digest
}

const installPackages = async (digest) => {
  say("Installing packages …")
  const npm = process.env.npm_execpath
  const args = ["ci", "--include=dev", "--no-audit", "--no-fund"]
  const { code, output } = npm === undefined ? await runQuietly("npm", args) : await runQuietly(process.execPath, [npm, ...args])
  if (code !== 0) {
    process.stderr.write(output)
    throw new Remedy("Installing the packages failed (npm ci, above). Check the network and the disk, then run the same command again.")
  }
  writeFileSync(packagesStamp, digest)
}

// --- the native addon ---

const addon = at("build", "kernels", "penstock.node")
const addonStamp = at("build", "kernels", ".penstock-sources")

/** A digest of all sources of the addon: unlike times it survives a checkout, a copy and a clock that is wrong. */
const sourcesDigest = () => {
  const hash = createHash("sha256").update(`${process.platform} ${process.arch}\n`)
  const walk = (folder) => {
    for (const entry of readdirSync(folder, { withFileTypes: true }).sort((a, b) => (a.name < b.name ? -1 : 1))) {
      const path = join(folder, entry.name)
      if (entry.isDirectory()) {
        if (entry.name !== "cuda") walk(path) // an addon of its own
      } else if (!entry.name.endsWith(".ts") && !entry.name.endsWith(".md")) hash.update(`${relative(root, path)}\n`).update(readFileSync(path))
    }
  }
  walk(at("kernels"))
  return hash.digest("hex")
}

const addonDue = () => {
  const digest = sourcesDigest()
  return existsSync(addon) && read(addonStamp) === digest ? undefined : digest
}

const has = (program) => spawnSync(program, ["--version"], { stdio: "ignore" }).status === 0

const toolsRemedy = (missing) => {
  const how = process.platform === "darwin"
    ? "xcode-select --install && brew install cmake"
    : process.platform === "win32"
      ? "winget install Kitware.CMake Microsoft.VisualStudio.2022.BuildTools"
      : has("apt-get")
        ? "sudo apt-get install cmake g++"
        : has("dnf")
          ? "sudo dnf install cmake gcc-c++"
          : has("pacman")
            ? "sudo pacman -S cmake gcc"
            : has("apk")
              ? "apk add cmake make g++"
              : "install the packages cmake and g++"
  return new Remedy(`Penstock builds native kernels and needs ${missing.join(" and ")}, not found here. Install with:\n  ${how}\nthen run the same command again.`)
}

const buildAddon = async (digest) => {
  const compilers = [process.env.CXX, "c++", "g++", "clang++"].filter((name) => name !== undefined && name !== "")
  const missing = []
  if (!has("cmake")) missing.push("CMake")
  if (process.platform !== "win32" && !compilers.some((name) => has(name))) missing.push("a C++ compiler")
  const ninja = has("ninja")
  if (process.platform !== "win32" && !ninja && !has("make")) missing.push("make (or ninja)")
  if (missing.length > 0) throw toolsRemedy(missing)

  say("Building the kernels …")
  const folder = at("build", "kernels")
  const cache = read(join(folder, "CMakeCache.txt"))
  // CMake refuses a build folder of another clone, or one that was moved.
  if (cache !== undefined && !cache.includes(`CMAKE_HOME_DIRECTORY:INTERNAL=${at("kernels").replaceAll("\\", "/")}\n`)) rmSync(folder, { recursive: true, force: true })
  const fresh = !existsSync(join(folder, "CMakeCache.txt"))
  // A compiler of optimised vector code takes up to a gigabyte.
  const jobs = Math.max(1, Math.min(availableParallelism(), Math.floor(totalmem() / 2 ** 30)))
  const steps = [
    ["-S", at("kernels"), "-B", folder, "-DCMAKE_BUILD_TYPE=Release", ...(fresh && ninja ? ["-G", "Ninja"] : [])],
    ["--build", folder, "--config", "Release", "--parallel", String(jobs)],
  ]
  let drawn = false
  for (const args of steps) {
    const { code, output } = await runQuietly("cmake", args, (line) => {
      const share = /^\[\s*(\d+\/\d+|\d+%)\]/.exec(line)?.[1]
      if (share !== undefined && process.stderr.isTTY) {
        process.stderr.write(`\rBuilding the kernels … ${share}\u001b[K`)
        drawn = true
      }
    })
    if (code !== 0) {
      if (drawn) say("")
      process.stderr.write(output)
      throw new Remedy(`Building the kernels failed (above). If a tool was updated, delete ${relative(root, folder)} and run the same command again.`)
    }
  }
  if (drawn) say("")
  if (!existsSync(addon)) throw new Remedy(`Building the kernels made no ${relative(root, addon)}: delete ${relative(root, folder)} and run the same command again.`)
  writeFileSync(addonStamp, digest)
}

/** Packages, addon and programs as the sources want them. One process at a time; the second finds nothing left to do. */
const ensure = async () => {
  checkNode()
  if (packagesDue() === undefined && addonDue() === undefined && programsDue() === undefined) return
  const { takeLock } = await import("./folder-lock.mjs")
  mkdirSync(at("build"), { recursive: true })
  const release = await takeLock(at("build", "bootstrap.lock"), {
    deadlineMs: 20 * 60_000,
    onWait: (holder) => say(`${holder} is installing or building here already; waiting for that`),
  })
  try {
    const packages = packagesDue()
    if (packages !== undefined) await installPackages(packages)
    const sources = addonDue()
    if (sources !== undefined) await buildAddon(sources)
    const programs = programsDue()
    if (programs !== undefined) await buildPrograms(programs)
  } finally {
    release()
  }
}

// --- what was asked for ---

/** npm does not pass SIGTERM on: when it is gone, this process would stay behind without anybody to end it. */
const followNpm = () => {
  if (process.env.npm_lifecycle_event === undefined) return
  const parent = process.ppid
  const watch = setInterval(() => {
    if (process.ppid === parent) return
    clearInterval(watch)
    process.kill(process.pid, "SIGTERM")
  }, 500)
  watch.unref()
}

const main = () => programArguments(at("gateway", "main.ts"))

/** The command line, in this process. */
const runMain = async (args) => {
  const [program] = main()
  process.argv = [process.execPath, program, ...args]
  followNpm()
  await import(pathToFileURL(program).href)
}

/** A child that shares the terminal. Ctrl-C reaches it by itself; this process waits for it and takes its exit code. */
const runChild = (args) =>
  new Promise((resolve, reject) => {
    const child = spawn(process.execPath, args, { cwd: root, stdio: "inherit" })
    const ignore = () => {}
    const forward = () => child.kill("SIGTERM")
    process.on("SIGINT", ignore)
    process.on("SIGTERM", forward)
    child.on("error", reject)
    child.on("close", (code, signal) => {
      process.off("SIGINT", ignore)
      process.off("SIGTERM", forward)
      resolve(code ?? (signal === "SIGINT" ? 130 : 1))
    })
  })

const runTests = async (args) => {
  // The tests of the real model need it. Without it they are skipped, and the one that begins as a user does fails.
  const pull = spawnSync(process.execPath, [...main(), "pull", "smollm2-135m"], { cwd: root, stdio: ["ignore", "ignore", "inherit"] })
  if (pull.status !== 0) say("The model could not be fetched (above): tests that need it are skipped, and that of the first start fails.")
  return runChild([at("node_modules", "vitest", "vitest.mjs"), "run", ...args])
}

const [task, ...args] = process.argv.slice(2)
try {
  await ensure()
  switch (task) {
    case "build":
      break
    case "start":
      await runMain(["up", ...args])
      break
    case "run":
      await runMain(args)
      break
    case "test":
      process.exitCode = await runTests(args)
      break
    case "cuda-toolchain": {
      const { fetchToolkit } = await import("./cuda-build.mjs")
      const { from, path, version } = fetchToolkit(say)
      say(`CUDA ${version}: ${path} (${from})`)
      break
    }
    case "cuda-build":
      ;(await import("./cuda-build.mjs")).buildCudaAddon(say)
      break
    case "cuda-test":
      process.exitCode = await runChild([...sourceArguments, at("test", "cuda", "main.ts"), ...args])
      break
    case "sanitize":
      process.exitCode = await runChild([...sourceArguments, at("test", "sanitize", "main.ts"), ...args])
      break
    default:
      throw new Remedy(`config/bootstrap.mjs: expected build, start, run, test, sanitize, cuda-toolchain, cuda-build or cuda-test, found ${String(task)}`)
  }
} catch (error) {
  say(error instanceof Remedy || error?.code === "ENOSPC" || error?.constructor?.name === "CudaBuildError" ? error.message : (error?.stack ?? String(error)))
  process.exit(1)
}
