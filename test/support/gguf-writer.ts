/**
 * A writer of GGUF v3 files, good and bad: counts, offsets and types can be set to anything.
 * Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
 */

import { Bytes, type Metadata } from "../../gateway/import/gguf-file.ts"

export { array, bool, Bytes, f32, text, u32, type Scalar, type ScalarType, type Value, type ValueType } from "../../gateway/import/gguf-file.ts"

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
  readonly metadata: Metadata
  readonly tensors: ReadonlyArray<TensorToWrite>
  readonly alignment?: number
  readonly magic?: string
  readonly version?: number
  readonly tensorCount?: bigint
  readonly keyCount?: bigint
}

export const ggufBytes = (file: GgufToWrite): Uint8Array => {
  const alignment = file.alignment ?? 32
  const out = new Bytes()
  out.raw(new TextEncoder().encode(file.magic ?? "GGUF")).u32(file.version ?? 3)
  out.u64(file.tensorCount ?? file.tensors.length).u64(file.keyCount ?? file.metadata.length)
  for (const [key, value] of file.metadata) out.text(key).value(value)
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
