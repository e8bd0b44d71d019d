/**
 * The typed face of the native addon, and the only TypeScript that touches it.
 *
 * Shapes are checked here, before anything crosses; native code throws plain `Error`s whose message
 * begins with the place (a file, a tensor, a batch field) and says what was expected.
 */
import { existsSync } from "node:fs"
import { createRequire } from "node:module"
import { fileURLToPath } from "node:url"

/** A metadata value of a GGUF file. 64-bit integers beyond 2^53 are refused by name. */
export type GgufValue = number | boolean | string | ReadonlyArray<number> | ReadonlyArray<boolean> | ReadonlyArray<string>

export interface GgufTensor {
  readonly name: string
  /** The format's own name: "F32", "BF16", "Q4_1", "Q6_K", … or "type 99" where it is not known. */
  readonly type: string
  /** Fastest dimension first, as in the file. */
  readonly shape: ReadonlyArray<number>
  readonly bytes: number
}

export interface Gguf {
  readonly path: string
  readonly version: number
  readonly fileBytes: number
  readonly metadata: ReadonlyMap<string, GgufValue>
  readonly tensors: ReadonlyArray<GgufTensor>
}

/** Instruction sets, slowest first. All give the same bits. */
export const instructionSets = ["reference", "avx2", "avx512"] as const
export type InstructionSet = (typeof instructionSets)[number]

/**
 * How keys and values are kept, in the pool and on the wire: as f16, or as codes of 8 or 4 bits with a scale and a zero, both f16,
 * of each token's key and of its value, head by head: x = zero + scale x code, zero the least of the head's numbers.
 *
 * The wire, little-endian, is [layer][block][K|V][kv head] of these: f16 [token][head dim]; or codes [token][head dim], then scales
 * [token], then zeros [token]. A code of int8 is a byte; a byte of int4 holds dimension i (low) and headDim / 2 + i (high).
 * A scale or zero that is not finite is taken as it comes: the step that attends to it is rejected, as with f16.
 */
export const kvDtypes = ["f16", "int8", "int4"] as const
export type KvDtype = (typeof kvDtypes)[number]

/** Bytes on the wire of one token's key, or value, of one head. */
export const kvBytes = (dtype: KvDtype, headDim: number): number => (dtype === "f16" ? 2 * headDim : (dtype === "int8" ? headDim : headDim / 2) + 4)

export interface EngineOptions {
  /** A GGUF file. It is mapped, and its matrices are repacked once. */
  readonly path: string
  /** Number of KV blocks in the pool; the pool is allocated once, here. */
  readonly blocks: number
  /** Tokens in a block. */
  readonly blockTokens: number
  /** How the pool keeps keys and values; f16 where it is left out. int8 takes an even headDim, int4 a multiple of 4. */
  readonly kvDtype?: KvDtype
  /** Threads that compute a step, the one it is run on included. */
  readonly threads: number
  /** The best instruction set that may be used; the machine's best below it is chosen. Omitted: no limit. */
  readonly isa?: InstructionSet
  /** Most rows (tokens) in a step. */
  readonly maxRows: number
  /** Most outputs (sampled or scored rows) in a step. */
  readonly maxOutputs: number
  /** Most tokens in a sequence; at most the model's own context length, which is the default. */
  readonly maxContext?: number
  /** "cpu", the default, or "cuda:N": a GPU, through an addon of its own. */
  readonly device?: string
  /** The addon of cuda:N; the one in build/cuda where it is left out. */
  readonly cudaAddon?: string | undefined
}

/** A GPU as its driver tells it. */
export interface DeviceFacts {
  readonly name: string
  readonly computeCapability: string
  /** Streaming multiprocessors. */
  readonly processors: number
  readonly totalBytes: number
  readonly freeBytes: number
  /** Of its memory, by clock and width; 0 where the driver does not tell. */
  readonly bytesPerS: number
}

export interface EngineInfo {
  readonly architecture: string
  readonly layers: number
  readonly hidden: number
  readonly heads: number
  readonly kvHeads: number
  readonly headDim: number
  readonly vocabulary: number
  /** Most tokens in a sequence. */
  readonly contextLength: number
  readonly blocks: number
  readonly blockTokens: number
  readonly kvDtype: KvDtype
  /** Bytes of one exported block: layers x 2 x kvHeads x blockTokens x kvBytes. */
  readonly blockBytes: number
  /** Bytes of one layer of one exported block: blockBytes / layers. */
  readonly layerBlockBytes: number
  /** Of what the host computes. */
  readonly isa: InstructionSet
  readonly threads: number
  /** "cpu", or a GPU's name with what is allocated there. */
  readonly device: string
}

/** Everything that decides how tokens are drawn. A sampler is a pure function of this and of the tokens so far. */
export interface SamplerOptions {
  /** 0: always the most likely token. */
  readonly temperature: number
  /** Keep the k most likely tokens; 0: all. */
  readonly topK: number
  /** Keep the smallest set whose probability reaches this; 1: all. */
  readonly topP: number
  /** Drop tokens less likely than this share of the most likely one's probability; 0: none. */
  readonly minP: number
  /** Divides positive and multiplies negative logits of tokens in prompt or output; 1: off (Keskar et al. 2019). */
  readonly repetitionPenalty: number
  /** Subtracted once from the logit of each token that occurs in the output. */
  readonly presencePenalty: number
  /** Subtracted for each occurrence in the output. */
  readonly frequencyPenalty: number
  /** Added to the logits of these tokens: [token, bias] pairs. */
  readonly logitBias: ReadonlyArray<readonly [token: number, bias: number]>
  /** These are never drawn while the output is shorter than `minTokens`. */
  readonly suppressedTokens: ReadonlyArray<number>
  readonly minTokens: number
  /** Key of the counter-based generator, with `choice` and the position; an integer in 0 … 2^53-1. */
  readonly seed: number
  readonly choice: number
}

/** One step over a mixed batch. A segment is a run of consecutive tokens of one sequence. */
export interface Batch {
  readonly tokens: Int32Array // [rows] token ids, segment after segment
  readonly segments: Int32Array // [segments, 4] rows, position of the first row, first entry in blockTables, entries
  readonly blockTables: Int32Array // block numbers; entry i of a segment holds positions i*blockTokens …
  readonly outputs: Int32Array // [outputs, 4] row, sampler (or -1), target token to score (or -1), number of top log probabilities (or -1: none at all, 0: that of the token only)
  /** Also return the raw logits of every output; for tests. */
  readonly wantLogits?: boolean
}

export interface StepResult {
  readonly tokens: Int32Array // [outputs] drawn token, or the target
  readonly logprobs: Float32Array // [outputs] log-softmax of the raw logits at that token; NaN where not asked for
  readonly topWidth: number // widest number of top log probabilities asked for
  readonly topTokens: Int32Array // [outputs, topWidth] most likely first, ties by lowest id; -1 beyond what was asked
  readonly topLogprobs: Float32Array // [outputs, topWidth]
  readonly logits: Float32Array | undefined // [outputs, vocabulary]
  readonly computeMs: number // wall time of the step off the event loop
}

/** What the addon exports. `index.ts` is its only caller. */
interface Addon {
  readGguf(path: string): Promise<{
    version: number
    fileBytes: number
    metadata: Array<[string, GgufValue]>
    tensors: Array<GgufTensor>
  }>
  loadEngine(options: EngineOptions & { readonly deviceNumber?: number }): Promise<NativeEngine>
  crc32c(bytes: Uint8Array, seed: number, isa?: InstructionSet): number
  bestInstructionSet(): InstructionSet
  readonly numericsVersion: number
}

interface NativeEngine {
  info(): EngineInfo
  createSampler(options: SamplerOptions, prompt: Int32Array, output: Int32Array): number
  freeSampler(id: number): void
  samplers(): number
  step(batch: Batch, onLayer?: (layer: number) => void): Promise<StepResult>
  exportLayers(blocks: Int32Array, firstLayer: number, layers: number, into: Uint8Array, offset: number, seed: number): number
  importLayers(blocks: Int32Array, firstLayer: number, layers: number, from: Uint8Array, offset: number, seed: number, crc: number): boolean
  copyLayers(from: NativeEngine, fromBlocks: Int32Array, firstLayer: number, layers: number, blocks: Int32Array): void
  copyBlock(from: number, to: number): void
  close(): Promise<void>
}

/** What the addon of GPUs exports. */
interface CudaAddon extends Pick<Addon, "loadEngine"> {
  deviceFacts(device: number): DeviceFacts
}

const addonPath = fileURLToPath(new URL("../build/kernels/penstock.node", import.meta.url))

let addon: Addon | undefined

const load = (): Addon => {
  if (addon === undefined) {
    if (!existsSync(addonPath)) throw new Error(`the native addon is not built (${addonPath}): run npm run build`)
    addon = createRequire(import.meta.url)(addonPath) as Addon
  }
  return addon
}

const cudaAddonPath = fileURLToPath(new URL("../build/cuda/penstock-cuda.node", import.meta.url))

/** N of "cuda:N", and of "cuda"; undefined for "cpu". */
const gpuNumber = (device: string): number | undefined => {
  const found = /^(?:cpu|cuda(?::(\d{1,3}))?)$/.exec(device)
  if (found === null) throw new Error(`device: expected cpu, cuda or cuda:N, found ${device}`)
  return device === "cpu" ? undefined : Number(found[1] ?? 0)
}

/** Only for who asks for a GPU: nothing else depends on it. */
const loadCuda = (device: string, path: string = cudaAddonPath): CudaAddon => {
  if (!existsSync(path)) {
    throw new Error(`${device}: the CUDA addon is not built (${path}): run npm run cuda:build, which needs a CUDA 13 compiler (CUDA_HOME, PATH, or npm run cuda:toolchain); or set device: cpu`)
  }
  return createRequire(import.meta.url)(path) as CudaAddon
}

/** What a GPU is and has free. Throws where there is no driver, no such device, or one too old, saying what was found and is needed. */
export const deviceFacts = (device: string, cudaAddon?: string): DeviceFacts => {
  const number = gpuNumber(device)
  if (number === undefined) throw new Error("device: expected cuda or cuda:N, found cpu")
  return loadCuda(device, cudaAddon).deviceFacts(number)
}

/**
 * Reads the header of a GGUF v3 file: metadata and tensor descriptions, no weights. Every count, length and offset is
 * checked against the file's size first; a hostile file is an error that names the file and the place in it.
 * Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
 */
export const readGguf = async (path: string): Promise<Gguf> => {
  const { metadata, ...rest } = await load().readGguf(path)
  return { path, ...rest, metadata: new Map(metadata) }
}

/** The best instruction set of this machine that the addon has a path for. */
export const bestInstructionSet = (): InstructionSet => load().bestInstructionSet()

/** Version of the numerics: a change of any bit of any result raises it. Part of the KV format id. */
export const numericsVersion = (): number => load().numericsVersion

/**
 * CRC-32C (Castagnoli, RFC 3720) of bytes that follow what `seed` is the CRC of; 0 for the first:
 * crc32c(b, crc32c(a, 0)) equals crc32c(ab, 0). Unsigned, 32 bits. `isa` limits the instruction set, as in EngineOptions.
 */
export const crc32c = (bytes: Uint8Array, seed: number, isa?: InstructionSet): number => load().crc32c(bytes, seed, isa)

/**
 * A model, its repacked weights and its KV pool on one device. One step runs at a time; a second call before the first
 * has settled is a programmer's error and rejects.
 */
export class Engine {
  readonly info: EngineInfo
  readonly #native: NativeEngine

  private constructor(native: NativeEngine) {
    this.#native = native
    this.info = native.info()
  }

  /** Maps and repacks the model and allocates the pool, off the event loop. */
  static async load(options: EngineOptions): Promise<Engine> {
    for (const key of ["blocks", "blockTokens", "threads", "maxRows", "maxOutputs"] as const) {
      if (!Number.isInteger(options[key]) || options[key] < 1) throw new Error(`${key}: expected a positive integer, found ${options[key]}`)
    }
    const { device = "cpu", cudaAddon, ...rest } = options
    const deviceNumber = gpuNumber(device)
    return new Engine(await (deviceNumber === undefined ? load().loadEngine(rest) : loadCuda(device, cudaAddon).loadEngine({ ...rest, deviceNumber })))
  }

  /**
   * A sampler with the tokens so far; its number goes into `Batch.outputs`. `step` appends what it draws. A sampler made
   * with the same options and tokens continues identically, here or elsewhere.
   */
  createSampler(options: SamplerOptions, prompt: Int32Array, output: Int32Array): number {
    return this.#native.createSampler(options, prompt, output)
  }

  freeSampler(id: number): void {
    this.#native.freeSampler(id)
  }

  /** Number of live samplers. */
  get samplers(): number {
    return this.#native.samplers()
  }

  /**
   * Runs one step off the event loop: writes the rows' KV into their blocks, then draws or scores each output.
   *
   * `onLayer` is called for every layer in order, soon after the KV of all rows is in the pool there and while the step goes on
   * with later layers; that layer of their blocks may be exported from then on. All calls come before the promise settles. If
   * one throws there are no more, and the step rejects with what was thrown when it has ended: its KV is written and its
   * tokens are drawn all the same.
   */
  step(batch: Batch, onLayer?: (layer: number) => void): Promise<StepResult> {
    return this.#native.step(batch, onLayer)
  }

  /**
   * Copies layers of these blocks to `offset` of `into` in the wire layout (see `kvDtypes`), blocks.length x layers x
   * `info.layerBlockBytes` long. Returns their CRC-32C, continued from `seed`.
   */
  exportLayers(blocks: Int32Array, firstLayer: number, layers: number, into: Uint8Array, offset: number, seed: number): number {
    return this.#native.exportLayers(blocks, firstLayer, layers, into, offset, seed)
  }

  /**
   * The inverse of `exportLayers`. False where the CRC-32C of those bytes, continued from `seed`, is not `crc`; what the blocks
   * hold is then undefined. Not while a step that uses them is in flight.
   */
  importLayers(blocks: Int32Array, firstLayer: number, layers: number, from: Uint8Array, offset: number, seed: number, crc: number): boolean {
    return this.#native.importLayers(blocks, firstLayer, layers, from, offset, seed, crc)
  }

  /** Whether `copyLayers` takes KV from there: another engine on CPUs, or another on GPUs, whose blocks hold the same. */
  canCopy(from: object): from is Engine {
    if (!(#native in from) || from.#native.constructor !== this.#native.constructor) return false
    return (["layers", "kvHeads", "headDim", "blockTokens", "kvDtype"] as const).every((key) => from.info[key] === this.info[key])
  }

  /**
   * Copies layers of another engine's blocks into these of this one, pool to pool: within a device, from GPU to GPU, or in the
   * host's memory. It is there when this returns. As with `exportLayers` and `importLayers`, `from` may be in a step, and no
   * step that uses `blocks` may be in flight.
   */
  copyLayers(from: Engine, fromBlocks: Int32Array, firstLayer: number, layers: number, blocks: Int32Array): void {
    this.#native.copyLayers(from.#native, fromBlocks, firstLayer, layers, blocks)
  }

  /** Copies a block out in the wire layout (see `kvDtypes`), `info.blockBytes` long. */
  exportBlock(block: number, into: Uint8Array): void {
    this.#checkBlock(block, into)
    this.#native.exportLayers(Int32Array.of(block), 0, this.info.layers, into, 0, 0)
  }

  /** The inverse of `exportBlock`. */
  importBlock(block: number, from: Uint8Array): void {
    this.#checkBlock(block, from)
    this.#native.importLayers(Int32Array.of(block), 0, this.info.layers, from, 0, 0, 0) // written whatever its CRC, with which there is nothing to compare
  }

  /** Copies all layers of a block, for copy-on-write. Not while a step that writes `from` or reads `to` is in flight. */
  copyBlock(from: number, to: number): void {
    this.#native.copyBlock(from, to)
  }

  /** Frees weights and pool after a step in flight has ended. */
  close(): Promise<void> {
    return this.#native.close()
  }

  #checkBlock(block: number, bytes: Uint8Array): void {
    if (!Number.isInteger(block) || block < 0 || block >= this.info.blocks) throw new Error(`block: ${block} is not in 0 … ${this.info.blocks - 1}`)
    if (bytes.byteLength !== this.info.blockBytes) throw new Error(`block bytes: expected ${this.info.blockBytes}, found ${bytes.byteLength}`)
  }
}
