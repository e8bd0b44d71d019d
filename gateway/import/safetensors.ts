/**
 * A checkpoint in safetensors: one file, or several with an index.
 * Format: https://github.com/huggingface/safetensors: a u64 length, so many bytes of JSON, and the tensors' bytes, to which its
 * offsets count; numbers are little-endian and rows lie one after another.
 */
import { open } from "node:fs/promises"
import { join } from "node:path"
import { ImportError } from "./import-error.ts"
import { expectFile, JsonFile } from "./json-file.ts"

export interface SafeTensor {
  readonly name: string
  readonly file: string
  readonly dtype: string
  /** Slowest dimension first. */
  readonly shape: ReadonlyArray<number>
  /** In the file. */
  readonly start: number
  readonly end: number
}

const mostHeaderBytes = 100_000_000 // the format's own limit
const pieceBytes = 4 << 20
const dtypeBytes: Readonly<Record<string, number>> = { F64: 8, I64: 8, F32: 4, I32: 4, F16: 2, BF16: 2, I16: 2, I8: 1, U8: 1, BOOL: 1 }

const isCount = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) >= 0
const isCounts = (value: unknown): value is ReadonlyArray<number> => Array.isArray(value) && value.every(isCount)

/** The tensors of a file; their bytes are not read. Throws ImportError where they do not lie within it, or have another size than their shape. */
const tensorsOf = async (folder: string, name: string): Promise<ReadonlyArray<SafeTensor>> => {
  const path = join(folder, name)
  const fail = (message: string): never => {
    throw new ImportError(`${name}: ${message}`)
  }
  const file = await expectFile(path).then(() => open(path)).catch((error: NodeJS.ErrnoException) => {
    if (error instanceof ImportError) throw error
    throw new ImportError(`${path}: ${error.code === "ENOENT" ? "expected a file, found none" : `cannot be read (${error.code})`}`)
  })
  try {
    const { size } = await file.stat()
    const { buffer: first, bytesRead } = await file.read(new Uint8Array(8), 0, 8, 0)
    const headerBytes = bytesRead < 8 ? 0 : Number(Buffer.from(first).readBigUInt64LE())
    if (headerBytes < 2 || headerBytes > Math.min(mostHeaderBytes, size - 8)) fail(`expected a header of at most ${mostHeaderBytes} bytes within the file's ${size}, found ${headerBytes}`)
    const { buffer } = await file.read(new Uint8Array(headerBytes), 0, headerBytes, 8)
    let header: Readonly<Record<string, { readonly dtype?: unknown; readonly shape?: unknown; readonly data_offsets?: unknown } | null>> = {}
    try {
      header = JSON.parse(Buffer.from(buffer).toString("utf8")) ?? {}
    } catch {
      fail("expected a header in JSON")
    }
    return Object.entries(header).flatMap(([tensor, entry]) => {
      if (tensor === "__metadata__") return []
      const { dtype, shape, data_offsets: offsets } = entry ?? {}
      const width = dtypeBytes[String(dtype)]
      if (width === undefined) fail(`${tensor}: dtype: expected one of ${Object.keys(dtypeBytes).join(", ")}, found ${JSON.stringify(dtype)}`)
      if (!isCounts(shape) || !isCounts(offsets) || offsets.length !== 2) return fail(`${tensor}: expected a shape and two data_offsets`)
      const [start, end] = offsets.map((offset) => 8 + headerBytes + offset) as [number, number]
      const bytes = shape.reduce((product, count) => product * count, width!)
      if (end > size || end - start !== bytes) fail(`${tensor}: data_offsets: expected ${bytes} bytes within the file's ${size}, found ${start} … ${end}`)
      return [{ name: tensor, file: path, dtype: String(dtype), shape, start, end }]
    })
  } finally {
    await file.close()
  }
}

/** The tensors of a folder by name: of model.safetensors, or of the files that model.safetensors.index.json names. */
export const readCheckpoint = async (folder: string): Promise<ReadonlyMap<string, SafeTensor>> => {
  const index = await JsonFile.find(folder, "model.safetensors.index.json")
  const places = index?.get("weight_map") ?? {}
  const files = new Set<string>(index === undefined ? ["model.safetensors"] : Object.values(places))
  const tensors = new Map<string, SafeTensor>()
  for (const name of files) {
    // A name with a folder in it could lead anywhere.
    if (typeof name !== "string" || !/^\w[\w.-]*$/.test(name)) index!.refuse("weight_map", "names of files beside it")
    for (const tensor of await tensorsOf(folder, name)) {
      const other = tensors.get(tensor.name)
      if (other !== undefined) throw new ImportError(`${tensor.file}: ${tensor.name}: expected in one file, found in ${other.file} too`)
      tensors.set(tensor.name, tensor)
    }
  }
  for (const [name, file] of Object.entries(places)) {
    const found = tensors.get(name)
    if (found?.file !== join(folder, String(file))) throw new ImportError(`${index!.name}: weight_map: ${name}: expected in ${String(file)}, found in ${found === undefined ? "none" : found.file}`)
  }
  return tensors
}

/** A tensor's bytes in pieces of whole rows of `rowBytes`, each a buffer of its own. */
export async function* readRows({ file, start, end }: SafeTensor, rowBytes: number): AsyncGenerator<Uint8Array> {
  const most = Math.max(1, Math.floor(pieceBytes / rowBytes)) * rowBytes
  const handle = await open(file)
  try {
    for (let at = start; at < end; at += most) {
      const piece = new Uint8Array(Math.min(most, end - at))
      for (let filled = 0; filled < piece.length; ) {
        const { bytesRead } = await handle.read(piece, filled, piece.length - filled, at + filled)
        if (bytesRead === 0) throw new ImportError(`${file}: has become shorter`)
        filled += bytesRead
      }
      yield piece
    }
  } finally {
    await handle.close()
  }
}
