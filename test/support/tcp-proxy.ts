/** A TCP proxy in front of a server, whose connections a test can cut, hold back and count. */
import { connect, createServer, type AddressInfo, type Socket } from "node:net"

export interface TcpProxy {
  readonly port: number
  /** What clients have sent. Text, since the protocol is. */
  sent(): string
  /** Ends all connections. */
  cut(): void
  /** Ends connections as soon as they are made, or no longer. */
  refuse(refusing: boolean): void
  /** Lets nothing through to the server, or again. */
  hold(holding: boolean): void
  close(): Promise<void>
}

export const tcpProxy = async (target: string): Promise<TcpProxy> => {
  const { hostname, port } = new URL(target)
  const clients = new Set<Socket>()
  let sent = ""
  let refusing = false
  let holding = false
  const server = createServer((client) => {
    if (refusing) return client.destroy()
    const upstream = connect(Number(port), hostname)
    clients.add(client)
    client.on("data", (chunk: Buffer) => {
      if (sent.length < 1_000_000) sent += chunk.toString("latin1")
      if (!upstream.write(chunk)) client.pause()
    })
    upstream.on("drain", () => holding || client.resume())
    upstream.pipe(client)
    const end = () => {
      clients.delete(client)
      client.destroy()
      upstream.destroy()
    }
    for (const socket of [client, upstream]) socket.on("close", end).on("error", end)
  })
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve))
  const cut = () => {
    for (const client of clients) client.destroy()
  }
  return {
    port: (server.address() as AddressInfo).port,
    sent: () => sent,
    cut,
    refuse: (now) => (refusing = now),
    hold: (now) => {
      holding = now
      for (const client of clients) {
        if (now) client.pause()
        else client.resume()
      }
    },
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve())
        cut()
      }),
  }
}
