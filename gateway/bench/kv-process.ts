import { servingPeer } from "./kv-peer.ts"
import { servePeer } from "./peer.ts"

servePeer(servingPeer())
