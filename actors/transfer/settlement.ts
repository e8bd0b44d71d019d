/** A promise and the two ways to settle it. */
export class Settlement<A> {
  readonly promise: Promise<A>
  resolve!: (value: A) => void
  reject!: (error: Error) => void

  constructor() {
    this.promise = new Promise<A>((resolve, reject) => {
      this.resolve = resolve
      this.reject = reject
    })
    this.promise.catch(() => {}) // whoever waits hears it; nobody has to
  }
}
