/**
 * A writer of GGUF v3 files, good and bad: counts, offsets and types can be set to anything.
 * Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
 */

/** Value types in the order of their ids. */
const valueTypes = ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"] as const
export type ValueType = (typeof valueTypes)[number]
export type ScalarType = Exclude<ValueType, "array">
export type Scalar = number | bigint | boolean | string

export type Value =
  | { readonly type: ScalarType; readonly value: Scalar }
  | { readonly type: "array"; readonly of: ScalarType; readonly values: ReadonlyArray<Scalar> }

export const u32 = (value: number): Value => ({ type: "u32", value })
export const f32 = (value: number): Value => ({ type: "f32", value })
export const bool = (value: boolean): Value => ({ type: "bool", value })
export const text = (value: string): Value => ({ type: "string", value })
export const array = (of: ScalarType, values: ReadonlyArray<Scalar>): Value => ({ type: "array", of, values })

/** Tensor types with a codec in quantise.ts, and their ids. */
export const tensorTypeIds = { F32: 0, F16: 1, Q4_0: 2, Q4_1: 3, Q5_0: 6, Q5_1: 7, Q8_0: 8, Q4_K: 12, Q5_K: 13, Q6_K: 14, BF16: 30 } as const
export type TensorTypeName = keyof typeof tensorTypeIds

export interface TensorToWrite {
  readonly name: string
  /** A name, or any id. */
  readonly type: TensorTypeName | number
  /** Fastest dimension first. */
  readonly shape: ReadonlyArray<number | bigint>
  readonly data: Uint8Array
  /** In the data section; omitted: right behind the tensor before, aligned. */
  readonly offset?: number | bigint
}

export interface GgufToWrite {
  readonly metadata: ReadonlyArray<readonly [key: string, value: Value]>
  readonly tensors: ReadonlyArray<TensorToWrite>
  readonly alignment?: number
  readonly magic?: string
  readonly version?: number
  readonly tensorCount?: bigint
  readonly keyCount?: bigint
}

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

  /** Zeros up to a multiple of `alignment`. */
  pad(alignment: number): this {
    return this.raw(new Uint8Array((alignment - (this.length % alignment)) % alignment))
  }

  done(): Uint8Array {
    return this.#bytes.slice(0, this.length)
  }
}

export const ggufBytes = (file: GgufToWrite): Uint8Array => {
  const alignment = file.alignment ?? 32
  const out = new Bytes()
  out.raw(new TextEncoder().encode(file.magic ?? "GGUF")).u32(file.version ?? 3)
  out.u64(file.tensorCount ?? file.tensors.length).u64(file.keyCount ?? file.metadata.length)
  for (const [key, value] of file.metadata) {
    out.text(key).u32(valueTypes.indexOf(value.type))
    if (value.type === "array") {
      out.u32(valueTypes.indexOf(value.of)).u64(value.values.length)
      for (const element of value.values) out.scalar(value.of, element)
    } else {
      out.scalar(value.type, value.value)
    }
  }
  const data = new Bytes()
  for (const tensor of file.tensors) {
    data.pad(alignment)
    out.text(tensor.name).u32(tensor.shape.length)
    for (const size of tensor.shape) out.u64(size)
    out.u32(typeof tensor.type === "number" ? tensor.type : tensorTypeIds[tensor.type]).u64(tensor.offset ?? data.length)
    data.raw(tensor.data)
  }
  return out.pad(alignment).raw(data.pad(alignment).done()).done()
}
