/**
 * The CUDA compiler, and what is built with it: `npm run cuda:toolchain`, `npm run cuda:build`, and the builds of `npm run test:cuda`.
 *
 * Plain JavaScript without dependencies, like bootstrap.mjs, which runs it. Nothing here concerns who computes on a CPU.
 */
import { spawnSync } from "node:child_process"
import { createHash } from "node:crypto"
import { accessSync, constants, existsSync, mkdirSync, readdirSync, readFileSync, realpathSync, renameSync, rmSync, statSync, writeFileSync } from "node:fs"
import { homedir } from "node:os"
import { delimiter, dirname, isAbsolute, join, relative } from "node:path"
import { fileURLToPath } from "node:url"

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const buildFolder = join(root, "build", "cuda")

/** The compiler's release, of which everything else is a part. */
const release = "13.5.37"
const leastMajor = 13

/** Wheels of PyPI that together are a toolkit: nvcc, its back end, headers and the runtime library. 129 MB, pinned by hash. */
const wheels = [
  ["nvidia-cuda-nvcc", release, "f5c4f7ead5d964fb4af42bbf1e6d3ec3c1e6e9d83b53749f691d387e7fcaa3a7"],
  ["nvidia-nvvm", release, "c41bfa362e407405163f103c2229f0765f8cc2ed7d148b754dc77f228bf7e070"],
  ["nvidia-cuda-crt", release, "e898b7f73d3035fa89915a3f7bf3b54a73e90249746111aed295822c4729bb29"],
  ["nvidia-cuda-runtime", release, "df2b79a8852f10d1fef8c848489c49eebb5754051bf870202a862831412b179d"],
  ["nvidia-cuda-cccl", "13.3.5.0.6", "d5230098fa2df5021e1a00c0c4eee41797671a91119d31e892463e5ccf3ee326"]
]

/** As readEnv in env.ts says, which needs TypeScript. */
const home = () => {
  const own = process.env.PENSTOCK_HOME?.trim()
  if (own !== undefined && isAbsolute(own)) return own
  const xdg = process.env.XDG_CACHE_HOME
  return join(xdg !== undefined && isAbsolute(xdg) ? xdg : join(homedir(), ".cache"), "penstock")
}

export class CudaBuildError extends Error {}

const run = (program, args, options = {}) => spawnSync(program, args, { cwd: root, encoding: "utf8", maxBuffer: 2 ** 28, timeout: 60 * 60_000, ...options })

/** "13.5" of a toolkit, or undefined where its nvcc does not run. */
const versionOf = (toolkit) => /release (\d+\.\d+)/.exec(run(join(toolkit, "bin", "nvcc"), ["--version"]).stdout ?? "")?.[1]

const fetchedToolkit = () => join(home(), "cuda", release, "nvidia", "cu13")

/** Folders that may be a toolkit, by who says so. */
const candidates = () => {
  const found = []
  const cudaHome = process.env.CUDA_HOME?.trim()
  if (cudaHome !== undefined && cudaHome !== "") found.push(["CUDA_HOME", cudaHome])
  for (const folder of (process.env.PATH ?? "").split(delimiter)) {
    const nvcc = join(folder, "nvcc")
    if (isAbsolute(folder) && existsSync(nvcc)) found.push(["PATH", dirname(dirname(realpathSync(nvcc)))])
  }
  if (existsSync(fetchedToolkit())) found.push(["npm run cuda:toolchain", fetchedToolkit()])
  return found
}

/** The first toolkit of CUDA 13 or later; undefined where there is none. */
export const findToolkit = () => {
  for (const [from, path] of candidates()) {
    const version = versionOf(path)
    if (version !== undefined && Number.parseInt(version, 10) >= leastMajor) return { from, path, version }
  }
  return undefined
}

const sayWhatIsThere = () => {
  const there = candidates().map(([from, path]) => `${from}: ${path} (${versionOf(path) ?? "its nvcc does not run"})`)
  return there.length === 0 ? "found none" : `found ${there.join(", ")}`
}

/** A toolkit, fetched from PyPI into PENSTOCK_HOME where there is none. */
export const fetchToolkit = (say) => {
  const found = findToolkit()
  if (found !== undefined) return found
  if (process.platform !== "linux" || process.arch !== "x64") throw new CudaBuildError(`The CUDA toolkit can be fetched for Linux on x86-64 only; set CUDA_HOME to one of CUDA ${leastMajor} (${sayWhatIsThere()}).`)
  const goal = join(home(), "cuda", release)
  const partial = `${goal}.${process.pid}`
  say(`Fetching the CUDA compiler ${release} from PyPI (129 MB) …`)
  mkdirSync(partial, { recursive: true })
  try {
    const requirements = join(partial, "requirements.txt")
    writeFileSync(requirements, wheels.map(([name, version, hash]) => `${name}==${version} --hash=sha256:${hash}\n`).join(""))
    const python = ["python3", "python"].find((name) => run(name, ["-m", "pip", "--version"]).status === 0)
    if (python === undefined) throw new CudaBuildError("Fetching the CUDA compiler needs Python with pip (apt-get install python3-pip); or set CUDA_HOME.")
    const args = ["-m", "pip", "install", "--disable-pip-version-check", "--no-warn-script-location", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--target", partial, "-r", requirements]
    const { status, stdout, stderr } = run(python, args)
    if (status !== 0) throw new CudaBuildError(`${stdout ?? ""}${stderr ?? ""}Fetching the CUDA compiler from PyPI failed (above). Check the network, or set CUDA_HOME to a toolkit of CUDA ${leastMajor}.`)
    rmSync(goal, { recursive: true, force: true })
    renameSync(partial, goal)
  } finally {
    rmSync(partial, { recursive: true, force: true })
  }
  const fetched = findToolkit()
  if (fetched === undefined) throw new CudaBuildError(`The CUDA compiler was fetched but does not run (${sayWhatIsThere()}).`)
  return fetched
}

/** Whether the kernel's part of an NVIDIA driver is loaded. */
export const hasGpu = () => {
  try {
    accessSync("/dev/nvidiactl", constants.R_OK | constants.W_OK)
    return true
  } catch {
    return false
  }
}

/** A digest of everything that the targets are made of, and of the compilers. */
export const sourcesDigest = (toolkit, paths) => {
  const compiler = run(process.env.CXX ?? "c++", ["--version"]).stdout ?? ""
  const hash = createHash("sha256").update(`${process.platform} ${process.arch} ${process.versions.node}\n${compiler}\n${toolkit?.version ?? "no toolkit"}\n`)
  const walk = (path) => {
    if (statSync(path).isDirectory()) for (const name of readdirSync(path).sort()) walk(join(path, name))
    else if (!path.endsWith(".md")) hash.update(`${relative(root, path)}\n`).update(readFileSync(path))
  }
  for (const path of paths) walk(join(root, path))
  return hash.digest("hex")
}

/** Builds targets of kernels/src/cuda/CMakeLists.txt. The toolkit may be missing where none of them needs it. */
export const buildTargets = (toolkit, targets) => {
  const cache = join(buildFolder, "CMakeCache.txt")
  // CMake refuses a folder of another clone, and remembers the libraries of another toolkit.
  const mark = `${root}\n${toolkit?.path ?? "none"}\n`
  const stamp = join(buildFolder, ".penstock-configured")
  if (existsSync(cache) && (!existsSync(stamp) || readFileSync(stamp, "utf8") !== mark)) rmSync(buildFolder, { recursive: true, force: true })
  const fresh = !existsSync(cache)
  const ninja = run("ninja", ["--version"]).status === 0
  const steps = [
    ["-S", join(root, "kernels", "src", "cuda"), "-B", buildFolder, "-DCMAKE_BUILD_TYPE=Release", `-DPENSTOCK_CUDA_HOME=${toolkit?.path ?? ""}`, ...(fresh && ninja ? ["-G", "Ninja"] : [])],
    ["--build", buildFolder, "--parallel", "2", "--target", ...targets]
  ]
  for (const args of steps) {
    const { status, stdout, stderr, error } = run("cmake", args)
    if (status !== 0) throw new CudaBuildError(`${stdout ?? ""}${stderr ?? ""}${error?.message ?? ""}\ncmake ${args.join(" ")} failed (above)`)
    writeFileSync(stamp, mark) // what is configured is of use, whether or not its build ends
  }
}

/** `npm run cuda:build`: the addon of GPUs, with whatever toolkit there is. */
export const buildCudaAddon = (say) => {
  const toolkit = findToolkit()
  if (toolkit === undefined) throw new CudaBuildError(`The CUDA addon needs a compiler of CUDA ${leastMajor} or later (${sayWhatIsThere()}). Set CUDA_HOME, put nvcc into PATH, or run npm run cuda:toolchain.`)
  say(`Building the CUDA addon with nvcc ${toolkit.version} (${toolkit.from}) …`)
  buildTargets(toolkit, ["penstock-cuda"])
}
