/**
 * Writing a GGUF v3 file.
 * Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
 */
import { open, rename, rm } from "node:fs/promises"
import { ImportError } from "./import-error.ts"

/** Value types in the order of their ids. */
export const valueTypes = ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"] as const
export type ValueType = (typeof valueTypes)[number]
export type ScalarType = Exclude<ValueType, "array">
export type Scalar = number | bigint | boolean | string

export type Value =
  | { readonly type: ScalarType; readonly value: Scalar }
  | { readonly type: "array"; readonly of: ScalarType; readonly values: ReadonlyArray<Scalar> }

export type Metadata = ReadonlyArray<readonly [key: string, value: Value]>

export const u32 = (value: number): Value => ({ type: "u32", value })
export const f32 = (value: number): Value => ({ type: "f32", value })
export const bool = (value: boolean): Value => ({ type: "bool", value })
export const text = (value: string): Value => ({ type: "string", value })
export const array = (of: ScalarType, values: ReadonlyArray<Scalar>): Value => ({ type: "array", of, values })

/** Little-endian bytes, appended. */
export class Bytes {
  #bytes = new Uint8Array(1024)
  #view = new DataView(this.#bytes.buffer)
  length = 0

  #reserve(count: number): number {
    const at = this.length
    if (at + count > this.#bytes.length) {
      const grown = new Uint8Array(Math.max(2 * this.#bytes.length, at + count))
      grown.set(this.#bytes)
      this.#bytes = grown
      this.#view = new DataView(grown.buffer)
    }
    this.length += count
    return at
  }

  raw(bytes: Uint8Array): this {
    const at = this.#reserve(bytes.length)
    this.#bytes.set(bytes, at)
    return this
  }

  u32(value: number): this {
    const at = this.#reserve(4)
    this.#view.setUint32(at, value, true)
    return this
  }

  u64(value: number | bigint): this {
    const at = this.#reserve(8)
    this.#view.setBigUint64(at, BigInt(value), true)
    return this
  }

  /** A u64 length and UTF-8. */
  text(value: string): this {
    const bytes = new TextEncoder().encode(value)
    return this.u64(bytes.length).raw(bytes)
  }

  scalar(type: ScalarType, value: Scalar): this {
    if (type === "string") return this.text(String(value))
    if (type === "u64") return this.u64(BigInt(value))
    if (type === "u32") return this.u32(Number(value))
    const width = { u8: 1, i8: 1, bool: 1, u16: 2, i16: 2, i32: 4, f32: 4, i64: 8, f64: 8 }[type]
    const at = this.#reserve(width)
    if (type === "i64") this.#view.setBigInt64(at, BigInt(value), true)
    else if (type === "f64") this.#view.setFloat64(at, Number(value), true)
    else if (type === "f32") this.#view.setFloat32(at, Number(value), true)
    else if (type === "i32") this.#view.setInt32(at, Number(value), true)
    else if (width === 2) this.#view.setUint16(at, Number(value) & 0xffff, true)
    else this.#view.setUint8(at, Number(value) & 0xff)
    return this
  }

  /** A type's id, and the value. */
  value(value: Value): this {
    this.u32(valueTypes.indexOf(value.type))
    if (value.type !== "array") return this.scalar(value.type, value.value)
    this.u32(valueTypes.indexOf(value.of)).u64(value.values.length)
    for (const element of value.values) this.scalar(value.of, element)
    return this
  }

  /** Zeros up to a multiple of `alignment`. */
  pad(alignment: number): this {
    return this.raw(new Uint8Array((alignment - (this.length % alignment)) % alignment))
  }

  done(): Uint8Array {
    return this.#bytes.slice(0, this.length)
  }
}

/** Ids and bytes of the types that are written. */
export const tensorTypes = { F32: { id: 0, bytes: 4 }, F16: { id: 1, bytes: 2 }, I32: { id: 26, bytes: 4 } } as const

export interface TensorToStream {
  readonly name: string
  readonly type: keyof typeof tensorTypes
  /** Fastest dimension first. */
  readonly shape: ReadonlyArray<number>
  /** The tensor's bytes, in pieces, little-endian. */
  readonly data: () => AsyncIterable<Uint8Array>
}

const alignment = 32
const aligned = (bytes: number): number => Math.ceil(bytes / alignment) * alignment
const bytesOf = ({ type, shape }: TensorToStream): number => shape.reduce((product, size) => product * size, tensorTypes[type].bytes)

/**
 * Writes a file that appears when it is whole, and not at all where something fails or `signal` says so.
 * @throws ImportError where the file, or one in the making, is there already; what reading a tensor throws
 */
export const writeGguf = async (path: string, metadata: Metadata, tensors: ReadonlyArray<TensorToStream>, signal?: AbortSignal): Promise<void> => {
  const header = new Bytes().raw(new TextEncoder().encode("GGUF")).u32(3).u64(tensors.length).u64(metadata.length)
  for (const [key, value] of metadata) header.text(key).value(value)
  let offset = 0
  for (const tensor of tensors) {
    header.text(tensor.name).u32(tensor.shape.length)
    for (const size of tensor.shape) header.u64(size)
    header.u32(tensorTypes[tensor.type].id).u64(offset)
    offset += aligned(bytesOf(tensor))
  }

  const part = `${path}.part`
  const file = await open(part, "wx").catch((error: NodeJS.ErrnoException) => {
    throw new ImportError(error.code === "EEXIST" ? `${part}: is there: another import writes it, or one was killed; remove it then` : `${part}: cannot be written (${error.code})`)
  })
  try {
    await file.writeFile(header.pad(alignment).done())
    for (const tensor of tensors) {
      let written = 0
      for await (const piece of tensor.data()) {
        signal?.throwIfAborted()
        await file.writeFile(piece)
        written += piece.length
      }
      if (written !== bytesOf(tensor)) throw new Error(`${tensor.name}: ${written} bytes were made, of ${bytesOf(tensor)}`)
      await file.writeFile(new Uint8Array(aligned(written) - written))
    }
    await file.sync()
    await rename(part, path)
  } catch (error) {
    await rm(part, { force: true })
    const { code } = error as NodeJS.ErrnoException
    throw code === "ENOSPC" || code === "EDQUOT" ? new ImportError(`${part}: the disk is full`) : error
  } finally {
    await file.close()
  }
}
