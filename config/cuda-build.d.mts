export interface Toolkit {
  /** Who says where it is: CUDA_HOME, PATH, or the command that fetched it. */
  readonly from: string
  readonly path: string
  /** As "13.5". */
  readonly version: string
}

/** The operator can mend it: one message, no stack. */
export class CudaBuildError extends Error {}
export const findToolkit: () => Toolkit | undefined
export const fetchToolkit: (say: (text: string) => void) => Toolkit
export const hasGpu: () => boolean
export const sourcesDigest: (toolkit: Toolkit | undefined, paths: ReadonlyArray<string>) => string
export const buildTargets: (toolkit: Toolkit | undefined, targets: ReadonlyArray<string>) => void
export const buildCudaAddon: (say: (text: string) => void) => void
