/**
 * Messages as bytes: msgpack on the wire, decoded against a Schema once, where they enter.
 */
import { Packr, Unpackr } from "msgpackr"
import { Result, Schema } from "effect"
import { Fault } from "./fault.ts"

const packr = new Packr({ useRecords: false, variableMapSize: true })
const unpackr = new Unpackr({ useRecords: false, copyBuffers: true })

export const pack = (value: unknown): Uint8Array => packr.pack(value)

/** Throws on bytes that are not msgpack. Binary fields are copies. */
export const unpack = (bytes: Uint8Array): unknown => unpackr.unpack(bytes as Buffer)

const decodeFaultUnknown = Schema.decodeUnknownResult(Fault)
const encodeFaultSync = Schema.encodeSync(Fault)

export const encodeFault = (fault: Fault): Uint8Array => pack(encodeFaultSync(fault))

/** Never throws: a fault that cannot be read is an internal fault of its sender. */
export const decodeFault = (bytes: Uint8Array, hop: string): Fault => {
  try {
    const result = decodeFaultUnknown(unpack(bytes))
    if (Result.isSuccess(result)) return result.success
  } catch {
    // Not msgpack: said below.
  }
  return new Fault({ code: "internal", message: `${hop}: failed with an error that cannot be read`, hop })
}

/** Runs a decoder of frames; whatever it throws is a Fault `internal` that names what was read. */
export const readFrame = <A>(what: string, read: () => A): A => {
  try {
    return read()
  } catch (error) {
    throw new Fault({ code: "internal", message: `${what}: ${error instanceof Error ? error.message : String(error)}`, hop: what })
  }
}

/** How a message is answered: not at all, once, or by a stream. */
export type MessageMode = "tell" | "ask" | "stream"

/** A message that crosses the bus: its verb (the last part of its subject), its Schema and that of its answer. */
export interface MessageType<A, R, Mode extends MessageMode = MessageMode> {
  readonly verb: string
  readonly mode: Mode
  encode(message: A): Uint8Array
  /** Throws a Fault `invalid_request` that names the field. */
  decode(bytes: Uint8Array): A
  encodeReply(reply: R): Uint8Array
  decodeReply(bytes: Uint8Array): R
}

type PlainSchema<A> = Schema.Codec<A, A, never, never>

const coder = <A>(what: string, schema: PlainSchema<A>) => {
  const decodeUnknown = Schema.decodeUnknownSync(schema)
  return {
    encode: (value: A): Uint8Array => pack(value),
    decode: (bytes: Uint8Array): A => {
      try {
        return decodeUnknown(unpack(bytes))
      } catch (error) {
        const reason = error instanceof Error ? error.message : String(error)
        throw new Fault({ code: "invalid_request", message: `${what}: ${reason}`, hop: what })
      }
    },
  }
}

const define = <A, R, Mode extends MessageMode>(verb: string, mode: Mode, schema: PlainSchema<A>, reply: PlainSchema<R>): MessageType<A, R, Mode> => {
  const message = coder(verb, schema)
  const answer = coder(`the answer to ${verb}`, reply)
  return { verb, mode, encode: message.encode, decode: message.decode, encodeReply: answer.encode, decodeReply: answer.decode }
}

/** A message that is not answered. */
export const defineTell = <A>(verb: string, schema: PlainSchema<A>): MessageType<A, void, "tell"> => define(verb, "tell", schema, Schema.Void as PlainSchema<void>)

/** A message that is answered once. */
export const defineAsk = <A, R>(verb: string, schema: PlainSchema<A>, reply: PlainSchema<R>): MessageType<A, R, "ask"> => define(verb, "ask", schema, reply)

/** A message that is answered by a stream, whose frames have their own layout. */
export const defineStream = <A>(verb: string, schema: PlainSchema<A>): MessageType<A, void, "stream"> => define(verb, "stream", schema, Schema.Void as PlainSchema<void>)
