import { servingLlamaCpp } from "./llama-cpp-runtime.ts"
import { servePeer } from "./peer.ts"

servePeer(servingLlamaCpp())
