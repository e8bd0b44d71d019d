/**
 * Messages of the NATS client as deliveries of the bus, and headers the other way.
 */
import { MsgHdrsImpl, type Msg, type MsgHdrs } from "@nats-io/transport-node"
import { limits } from "../../config/limits.ts"
import { header, type Delivery, type Headers } from "./bus.ts"
import { Fault, type FaultCode } from "./fault.ts"
import { callSafely } from "./inboxes.ts"

export const hop = "bus nats"
/** `NATS/1.0` and the empty line; each header adds `name: value` and a line end. */
const headersBytes = 12
const headerBytes = 4
/** The verb of the protocol, the two sizes and the line ends. */
export const messageBytes = 32
const headerName = /^[!-9;-~]+$/
// The client cuts outer white space off, and a line end would begin another header.
const headerValue = /^(?!\s)[^\r\n\0]*(?<!\s)$/

export const refusal = (code: FaultCode, subject: string, why: string): Fault =>
  new Fault({ code, message: `publish to ${subject}: ${why}`, hop, ...(code === "overloaded" ? { retryAfterMs: limits.retryAfterMs } : {}) })

/** Bytes of the headers on the wire. Throws on names and values that would not arrive as they are. */
export const bytesOf = (subject: string, headers: Headers | undefined): number => {
  if (headers === undefined) return 0
  let bytes = headersBytes
  for (const name in headers) {
    const value = headers[name]!
    if (!headerName.test(name) || !headerValue.test(value)) throw refusal("invalid_request", subject, `header ${JSON.stringify(name)} has a name or value that cannot be sent`)
    bytes += name.length + Buffer.byteLength(value) + headerBytes
  }
  return bytes
}

export const encodeHeaders = (headers: Headers): MsgHdrs => {
  const lists: Record<string, Array<string>> = {}
  for (const name in headers) lists[name] = [headers[name]!]
  return MsgHdrsImpl.fromRecord(lists)
}

/** A message that cannot be read is dropped, since what is thrown here ends the client's reading for good. */
export const withDelivery = (message: Msg, handler: (delivery: Delivery) => void): void => {
  let delivery: Delivery
  try {
    delivery = toDelivery(message)
  } catch (error) {
    return console.error(`bus nats: a message to ${message.subject} has headers that cannot be read`, error)
  }
  callSafely(handler, delivery)
}

/**
 * Data stays a view. The client never writes into a buffer again that it has given out: the socket makes a new one for
 * each read, and a message over several reads gets its own. So keeping a view is safe, and costs the memory around it.
 */
const toDelivery = (message: Msg): Delivery => {
  const { buffer, byteOffset, byteLength } = message.data
  // Where the client gives a Buffer: its `slice` would be a view, and not a copy as that of any other Uint8Array is.
  const data = new Uint8Array(buffer, byteOffset, byteLength)
  const reply = message.reply
  const headers: Record<string, string> = {}
  if (message.headers !== undefined) {
    for (const [name, values] of message.headers) headers[name] = values.at(-1) ?? ""
    // Newer servers say which subject it was.
    if (message.headers.code === 503 && data.byteLength === 0) return { subject: message.subject, data, reply: undefined, headers: { [header.noResponders]: headers["Nats-Subject"] ?? "" } }
  }
  return { subject: message.subject, data, headers, reply: reply === undefined || reply === "" ? undefined : reply }
}
