/** How busy other programs are while something is measured. */
import { readFileSync } from "node:fs"
import { cpus } from "node:os"

/** What Linux counts processor time in, whatever the machine. */
const msOfTick = 10

/** Processor time of a process, all its threads together; undefined where the system does not tell. */
const processMs = (pid: number | undefined): number | undefined => {
  try {
    // The second field is a name in parentheses that may hold anything.
    const fields = readFileSync(`/proc/${pid}/stat`, "utf8").split(") ").at(-1)!.split(" ")
    return (Number(fields[11]) + Number(fields[12])) * msOfTick
  } catch {
    return undefined
  }
}

const coresMs = () => {
  const sums = cpus().map(({ times: { user, nice, sys, irq, idle } }) => ({ busy: user + nice + sys + irq, all: user + nice + sys + irq + idle }))
  return { busy: sums.reduce((sum, { busy }) => sum + busy, 0), all: sums.reduce((sum, { all }) => sum + all, 0) }
}

/** Runs something that this process and `pid` do, and tells which share of the cores' time others took meanwhile; undefined where that is not known. */
export const besideOthers = async <A>(pid: number | undefined, run: () => Promise<A>): Promise<{ readonly value: A; readonly othersShare: number | undefined }> => {
  const own = () => {
    const peer = processMs(pid)
    const here = process.cpuUsage()
    return peer === undefined ? undefined : peer + (here.user + here.system) / 1000
  }
  const [cores, ours] = [coresMs(), own()]
  const value = await run()
  const [coresAfter, oursAfter] = [coresMs(), own()]
  if (ours === undefined || oursAfter === undefined) return { value, othersShare: undefined }
  return { value, othersShare: Math.max(0, coresAfter.busy - cores.busy - (oursAfter - ours)) / Math.max(1, coresAfter.all - cores.all) }
}
