import { receivingPeer } from "./kv-peer.ts"
import { servePeer } from "./peer.ts"

servePeer(receivingPeer())
