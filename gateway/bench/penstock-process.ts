import { servePeer } from "./peer.ts"
import { servingPenstock } from "./penstock-runtime.ts"

servePeer(servingPenstock())
