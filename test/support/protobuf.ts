/** The wire format of Protocol Buffers, as much of it as a message needs to be read without its definition. */
export interface Field {
  readonly number: number
  /** Bytes of a message, string or bytes field; of a number of fixed width, little-endian. */
  readonly bytes: Uint8Array
  /** Of a varint field. */
  readonly varint: bigint
}

const noBytes = new Uint8Array(0)

/** The fields of a message in the order of writing. */
export const fieldsOf = (message: Uint8Array): ReadonlyArray<Field> => {
  const fields: Array<Field> = []
  let at = 0
  const varint = (): bigint => {
    let value = 0n
    for (let shift = 0n; ; shift += 7n) {
      const byte = message[at++]
      if (byte === undefined) throw new Error("a protobuf message is cut short")
      value |= BigInt(byte & 0x7f) << shift
      if (byte < 0x80) return value
    }
  }
  const take = (length: number): Uint8Array => {
    if (at + length > message.byteLength) throw new Error("a protobuf message is cut short")
    at += length
    return message.subarray(at - length, at)
  }
  while (at < message.byteLength) {
    const tag = Number(varint())
    const number = tag >> 3
    const wireType = tag & 7
    if (wireType === 0) fields.push({ number, bytes: noBytes, varint: varint() })
    else if (wireType === 1) fields.push({ number, bytes: take(8), varint: 0n })
    else if (wireType === 2) fields.push({ number, bytes: take(Number(varint())), varint: 0n })
    else if (wireType === 5) fields.push({ number, bytes: take(4), varint: 0n })
    else throw new Error(`wire type ${wireType} is not known`)
  }
  return fields
}

/** The bytes of every field of this number. */
export const all = (message: Uint8Array, number: number): ReadonlyArray<Uint8Array> => fieldsOf(message).flatMap((field) => (field.number === number ? [field.bytes] : []))

export const text = (message: Uint8Array, number: number): string => Buffer.from(all(message, number)[0] ?? noBytes).toString("utf8")

export const hex = (message: Uint8Array, number: number): string => Buffer.from(all(message, number)[0] ?? noBytes).toString("hex")
