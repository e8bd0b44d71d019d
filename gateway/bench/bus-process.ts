import { serveOverNats } from "./bus-peer.ts"
import { servePeer } from "./peer.ts"

servePeer(serveOverNats)
