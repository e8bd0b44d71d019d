/** Where tests find the real model, SmolLM2-135M-Instruct (Q4_1). */
import { existsSync } from "node:fs"
import { join } from "node:path"
import { readEnv } from "../../config/env.ts"

/** SmolLM2 in the cache, or undefined: tests that need the real model are then skipped. */
export const realModelPath = (home: string = readEnv().home): string | undefined =>
  ["models/b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53/SmolLM2-135M-Instruct.Q4_1.gguf", "model.gguf"]
    .map((name) => join(home, name))
    .find((path) => existsSync(path))
