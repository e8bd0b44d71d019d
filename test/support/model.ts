/** Where tests find the real model, SmolLM2-135M-Instruct (Q4_1). */
import { existsSync } from "node:fs"
import { join } from "node:path"
import { readEnv } from "../../config/env.ts"

/** SmolLM2 in the cache, or undefined: tests that need the real model are then skipped. */
export const realModelPath = (home: string = readEnv().home): string | undefined =>
  ["models/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf", "model.gguf"]
    .map((name) => join(home, name))
    .find((path) => existsSync(path))
