import { Effect } from "effect"
import { throughput } from "./gateway/bench/kv-throughput.ts"
const path = process.env.HOME + "/.cache/penstock/models/b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53/SmolLM2-135M-Instruct.Q4_1.gguf"
for (let i = 0; i < 3; i++) console.log(await Effect.runPromise(Effect.scoped(throughput(path))))
process.exit(0)
