/**
 * Every bound of the system in one place: units last in the name, relations asserted at start.
 */
export const limits = {
  /** Most bytes of a topology file: a hundred workers with every key take 20 KiB. */
  topologyBytes: 64 * 1024,
  /** Most actors' messages waiting in one mailbox; the next is refused as overloaded. */
  mailboxMessages: 1024,
  /** Senders whose latest incarnation an actor remembers, and for how long after its last word it refuses what an earlier one asks. */
  fencedSenders: 4_096,
  fenceMs: 60_000,
  /** Most streams (requests) an actor serves at once; the next is refused as overloaded. */
  actorStreams: 1024,
  /** Most bytes of one bus message, headers included: the default max_payload of a NATS server. */
  maxPayloadBytes: 1024 * 1024,
  /** Bytes given to the NATS client that the server has not taken yet, beyond which publishing is refused as overloaded. */
  busPendingBytes: 128 * 1024 * 1024,
  /** The server is asked how far it is each time this many bytes were published. */
  busConfirmBytes: 1024 * 1024,
  /** Longest wait for a NATS server to answer when a connection is made; where many processes start at once on few cores, TLS takes seconds. */
  busConnectDeadlineMs: 15_000,
  /** A lost connection is tried again after this long, doubling, half of it by chance … */
  busReconnectDelayMs: 50,
  /** … up to this. */
  busReconnectDelayMaxMs: 2_000,
  /** A NATS connection is probed this often; after three probes without an answer it is lost. */
  busPingIntervalMs: 3_000,
  /** Time that closing a bus may take to deliver what is on its way. */
  busDrainDeadlineMs: 1_000,
  /** Subjects that a NATS server has refused to take from this process and that are remembered, so that it is not asked again. */
  busRefusedSubjects: 256,
  /** A cluster is led by one node until it has not renewed its lease for this long; it renews it with each heartbeat. */
  leaderLeaseMs: 5_000,
  /** Silence of a node after which what it runs is placed elsewhere. */
  nodeLossMs: 8_000,
  /** Longest wait of an agent for another one of its name on this machine to end. */
  agentLockDeadlineMs: 5_000,
  /** A process of a node goes on for so long without an agent, which may come back and adopt it. */
  orphanLeaseMs: 60_000,
  /** Longest wait of a node for all of a new assignment to serve, on all nodes, before it stops what is not part of it. */
  assignmentDeadlineMs: 180_000,
  /** A cluster's bucket is looked at this often, beside whenever a write is heard of. */
  bucketPollMs: 1_000,
  /** Longest wait for a spawned nats-server to listen. */
  natsServerStartDeadlineMs: 10_000,
  /** Time that a nats-server has to end before it is killed. */
  natsServerStopDeadlineMs: 1_000,
  /** Longest time that building a nats-server may take before the next source is tried. */
  natsServerBuildDeadlineMs: 300_000,
  /** What a spawned nats-server holds for one connection that does not read before it cuts it off. */
  natsServerPendingBytes: 256 * 1024 * 1024,
  /** Longest wait for the answer to a control message. */
  askDeadlineMs: 5_000,
  /** Frames that a stream's reader lets be on their way before it has consumed them. */
  streamWindowFrames: 64,
  /** Frames that a stream's writer keeps for a reader that grants no credit, beyond which the stream fails. */
  streamBacklogFrames: 4_096,
  /** A writer with nothing to say sends a sign of life this often … */
  streamKeepAliveMs: 1_000,
  /** … and a reader that hears nothing for this long takes its writer for dead. */
  streamSilenceMs: 10_000,
  /** Longest wait for the first frame of a stream (its acceptance). */
  streamOpenDeadlineMs: 5_000,
  /** Longest life of a request, queueing included. */
  requestDeadlineMs: 600_000,
  /** How often a worker tells the scheduler that it lives, and its load. */
  heartbeatIntervalMs: 500,
  /** Silence of a worker after which it is dead to the scheduler. */
  heartbeatSilenceMs: 3_000,
  /** The scheduler's predicted load of a request that no worker knows of lapses after this. */
  placementLeaseMs: 30_000,
  /** Prompts wait in the scheduler's queue once a worker has so much of them to compute, at the speed that it has measured … */
  prefillQueueMs: 2_000,
  /** … or so many tokens, before there was anything to measure. */
  prefillQueueTokens: 2_048,
  /** Longest wait for a placement in the scheduler's queue. */
  placementDeadlineMs: 300_000,
  /** Longest time a request waits for a worker to come back before it fails. */
  recoveryDeadlineMs: 30_000,
  /** Most placements of one request, the first included. */
  placementAttempts: 4,
  /** Most times that one request is given away by its worker, or its request actor, and placed again at once … */
  movesPerRequest: 64,
  /** … while the KV that a worker has given away is not fetched, the worker waits so long for it before it ends. */
  movedKvMs: 300,
  /** Streams that an actor gives away together, and how long others go on undisturbed then: each pauses for itself, and not for all. */
  movesAtOnce: 4,
  moveSpacingMs: 100,
  /** Time that an actor has to give away what it does when it is told to end. */
  leaveDeadlineMs: 1_000,
  /** What a refused client is asked to wait before it tries again. */
  retryAfterMs: 1_000,
  /** Tokens (rows) of one engine step: decode rows first, then prefill chunks up to this. */
  stepTokens: 512,
  /** The same while streams are decoding, which wait for the whole step. */
  mixedStepTokens: 256,
  /** Sampled or scored rows of one engine step. */
  stepOutputs: 512,
  /** An engine counts its blocks when it has had nothing to do for this long. */
  idleCheckMs: 1_000,
  /** Most sequences that a worker may be configured to decode at once. */
  maxBatch: 256,
  /** Choices of one request (OpenAI's bound). */
  choices: 128,
  /** Top log probabilities of one token (OpenAI's bound). */
  topLogprobs: 20,
  /** Stop strings of one request. */
  stopStrings: 16,
  stopStringChars: 512,
  /** Biased tokens of one request. */
  logitBiases: 1_024,
  /** Most bytes of one HTTP body or WebSocket message. */
  bodyBytes: 8 * 1024 * 1024,
  /** Most bytes of text that `/tokenize` takes: it has no context's limit to stop at. */
  tokenizeBytes: 256 * 1024,
  /** What a chat message takes on the bus besides its texts. */
  messageOverheadBytes: 32,
  /** Prompts of one completions request. */
  promptBatch: 64,
  /** Open requests of one gateway; the next is refused as overloaded. */
  gatewayRequests: 1_024,
  /** Open WebSocket connections of one gateway. */
  webSockets: 256,
  /** Responses waiting on one WebSocket connection. */
  webSocketQueue: 16,
  /** Earlier responses that a WebSocket connection can be continued from, and the bytes kept for them. */
  webSocketTurns: 16,
  webSocketTurnBytes: 8 * 1024 * 1024,
  /** How long a completed response is kept for whoever asks for it or goes on from it, unless its request says store: false … */
  storedResponseMs: 3_600_000,
  /** … and how many of one tenant, in how many bytes; the oldest go first. */
  storedResponses: 1_024,
  storedResponseBytes: 64 * 1024 * 1024,
  /** What has outlived its time is forgotten this often. */
  storedResponseSweepMs: 10_000,
  /** Bytes waiting in a WebSocket's buffer above which nothing more is read for it. */
  webSocketBufferBytes: 64 * 1024,
  /** Attempts of one generation whose request actor is lost, the first included, and the wait before the second (then doubling). */
  generateAttempts: 6,
  generateRetryDelayMs: 100,
  /** Stop token ids of one request. */
  stopTokenIds: 1_024,
  /** Silence on an SSE stream or WebSocket after which a keep-alive is sent. */
  clientKeepAliveMs: 15_000,
  /** A client that takes nothing for this long is taken for gone. */
  clientStallMs: 60_000,
  /** Blocks waiting to be put into the KV store; more are dropped, which costs a later miss only. */
  storeQueueBlocks: 4_096,
  /** A put waits this long at most for prompts that are being computed or moved by the same worker. */
  storeYieldMs: 1_000,
  /** Blocks of one put. */
  storeBatchBlocks: 16,
  /** A put that takes longer is given up, and its blocks in the pool are let go. */
  storePutDeadlineMs: 5_000,
  /** Sources of KV whose bandwidth a worker remembers; the one that was used longest ago is forgotten. */
  costSources: 64,
  /** Transfers that the prefix of one sequence is fetched by, each from one store. */
  storeRuns: 16,
  /** Formats whose layout a KV store remembers; the one that was put longest ago is forgotten. */
  storeFormats: 64,
  /** Transfers that a KV store has open at once; beyond them it has nothing and wants nothing. */
  storeTransfers: 64,
  /** A transfer with the KV store that has not ended by then is given up. */
  storeTransferLeaseMs: 30_000,
  /** Share of a tier's bytes above which it gives up blocks … */
  storeHighWatermark: 0.95,
  /** … down to this one, so that it does not look for one block at a time … */
  storeLowWatermark: 0.9,
  /** … and so many at once at most, beyond what it needs. */
  storeEvictionBatch: 1_024,
  /** Share of a tier's bytes that may be pinned, by all and by one tenant, and for how long a pin lasts at most. */
  storePinShare: 0.5,
  storePinTenantShare: 0.25,
  storePinMs: 3_600_000,
  /** What a KV store remembers of pins: who wants blocks kept, and how many blocks, here or not. */
  storePinOwners: 4_096,
  storePinnedBlocks: 262_144,
  /** How long the KV of a conversation is kept after a turn of it, unless the next one comes or its connection closes. */
  conversationPinMs: 300_000,
  /** Blocks that one message of a KV store names at most. */
  storeMessageBlocks: 65_536,
  /** Bytes of blocks that wait to be written to disk; more are not, which costs a miss once they have left the memory. */
  storeDiskQueueBytes: 64 * 1024 * 1024,
  /** Blocks that are read from disk at once: with the one that is written they leave a thread of the pool to the engine's steps. */
  storeDiskReads: 2,
  /** A disk that cannot be used is tried again after this. */
  storeDiskRetryMs: 30_000,
  /** Longest wait of a KV store that starts for another process to leave its folder. */
  storeLockDeadlineMs: 1_000,
  /** Time that a KV store which ends has to write what waits. */
  storeFlushDeadlineMs: 1_000,
  /** Longest wait of a KV store for another one's word. */
  storePeerDeadlineMs: 250,
  /** A block that was sent this often is copied to another KV store, where there is one. */
  storeHotUses: 8,
  /** Longest wait for an answer of the KV store; after it, a miss. */
  storeDeadlineMs: 2_000,
  /** … and the least, where what it may have could be computed sooner. */
  storeAnswerMs: 100,
  /**
   * Bytes of one chunk of a KV transfer at most, its header included; on a bus with a smaller limit chunks are cut to that. One
   * layer of one block is the least, and where that does not fit the bus, a worker that moves KV does not start.
   */
  kvChunkBytes: 512 * 1024,
  /** Groups of layers in which a step's KV leaves, where whoever receives it computes on the same cores; elsewhere each layer does. */
  kvSharedCoresGroups: 3,
  /** Bytes of chunks that a receiver lets be on their way. */
  kvWindowBytes: 8 * 1024 * 1024,
  /** Most that a sender takes another's word for. */
  kvCreditBytes: 64 * 1024 * 1024,
  /** What a KV layout that comes in a message has at most: its layers, the tokens of a block, and the bytes of a block and of its layer. */
  kvLayers: 1_024,
  kvBlockTokens: 1_024,
  kvLayerBlockBytes: 64 * 1024 * 1024,
  kvBlockBytes: 1024 * 1024 * 1024,
  /** Bytes of chunks that a sender writes before others of its process have a turn. */
  kvTurnBytes: 2 * 1024 * 1024,
  /** A sender without an answer repeats how far it is this often. */
  kvProgressIntervalMs: 100,
  /** A transfer on which nothing comes for this long has failed. */
  kvSilenceMs: 10_000,
  /** KV events that a worker keeps; a scheduler that misses more is told of everything that is there. */
  kvEventRing: 4_096,
  /** … of so many blocks at most. */
  kvEventHashes: 32_768,
  /** Share of the machine's free memory that `kv.blocks: auto` takes at most, and its bound. */
  autoPoolMemoryShare: 0.25,
  autoPoolBytes: 2 * 1024 * 1024 * 1024,
  /** On a GPU weights take up to so much of the bytes that they have in the file, and `kv.blocks: auto` this share of what they leave. */
  gpuWeightShare: 1.7,
  gpuPoolMemoryShare: 0.8,
  /** Longest wait for what a worker decodes to go on elsewhere, or to end, before it is stopped. */
  drainDeadlineMs: 30_000,
  /** A step of a plan that failed is tried again after this long, doubling … */
  reconcileRetryMs: 1_000,
  /** … up to this. */
  reconcileRetryMaxMs: 60_000,
  /** Commands that wait for a running Penstock ask it this often. */
  operatePollMs: 150,
  /** A topology file that changes is read once it has been the same for this long … */
  topologySettleMs: 150,
  /** … and looked at this often where the file system tells nothing of it. */
  topologyPollMs: 1_000,
  /** Changes of the topology that are remembered … */
  topologyChanges: 32,
  /** … and so many of them in a status. */
  shownChanges: 8,
  /** Longest wait for a component's process to serve, its model loaded. */
  componentStartDeadlineMs: 120_000,
  /** A signal to the whole process group reaches all of its processes within this time. */
  groupSignalMs: 1_000,
  /** Time that open streams have to end at shutdown, after which they are told why and closed. */
  shutdownGraceMs: 300,
  /** Time that the rest of an orderly shutdown may take. */
  shutdownDeadlineMs: 3_000,
  /** Spans are sent this long after they have ended, in batches. */
  telemetryDelayMs: 1_000,
  /** Longest wait of a process that ends for its last spans to be taken. */
  telemetryFlushDeadlineMs: 400,
  /** A supervisor waits this long before the first restart, doubling … */
  restartDelayMs: 50,
  /** … up to this. */
  restartDelayMaxMs: 5_000,
} as const

const relations: ReadonlyArray<readonly [holds: boolean, relation: string]> = [
  [limits.streamKeepAliveMs * 3 <= limits.streamSilenceMs, "streamKeepAliveMs * 3 <= streamSilenceMs"],
  [limits.streamSilenceMs * 2 <= limits.fenceMs, "streamSilenceMs * 2 <= fenceMs"],
  [limits.heartbeatIntervalMs * 3 <= limits.heartbeatSilenceMs, "heartbeatIntervalMs * 3 <= heartbeatSilenceMs"],
  [limits.heartbeatIntervalMs * 5 <= limits.leaderLeaseMs, "heartbeatIntervalMs * 5 <= leaderLeaseMs"],
  [limits.heartbeatSilenceMs * 2 <= limits.nodeLossMs, "heartbeatSilenceMs * 2 <= nodeLossMs"],
  [limits.maxPayloadBytes <= limits.busConfirmBytes, "maxPayloadBytes <= busConfirmBytes"],
  [limits.busConfirmBytes * 16 <= limits.busPendingBytes, "busConfirmBytes * 16 <= busPendingBytes"],
  [limits.kvWindowBytes * 16 <= limits.busPendingBytes, "kvWindowBytes * 16 <= busPendingBytes"],
  [limits.busPendingBytes <= limits.natsServerPendingBytes, "busPendingBytes <= natsServerPendingBytes"],
  [limits.busPingIntervalMs * 3 <= limits.streamSilenceMs, "busPingIntervalMs * 3 <= streamSilenceMs"],
  [limits.busReconnectDelayMaxMs * 4 <= limits.recoveryDeadlineMs, "busReconnectDelayMaxMs * 4 <= recoveryDeadlineMs"],
  [limits.busDrainDeadlineMs + limits.natsServerStopDeadlineMs < limits.shutdownDeadlineMs, "busDrainDeadlineMs + natsServerStopDeadlineMs < shutdownDeadlineMs"],
  // Processes end stage by stage, the gateway's last.
  [limits.telemetryFlushDeadlineMs * 4 + limits.busDrainDeadlineMs < limits.shutdownDeadlineMs, "telemetryFlushDeadlineMs * 4 + busDrainDeadlineMs < shutdownDeadlineMs"],
  [limits.kvChunkBytes < limits.maxPayloadBytes, "kvChunkBytes < maxPayloadBytes"],
  [limits.kvChunkBytes * 4 <= limits.kvWindowBytes, "kvChunkBytes * 4 <= kvWindowBytes"],
  [limits.kvWindowBytes <= limits.kvCreditBytes, "kvWindowBytes <= kvCreditBytes"],
  [limits.kvCreditBytes <= limits.busPendingBytes, "kvCreditBytes <= busPendingBytes"],
  [limits.kvLayerBlockBytes <= limits.kvBlockBytes, "kvLayerBlockBytes <= kvBlockBytes"],
  [limits.kvProgressIntervalMs * 10 <= limits.kvSilenceMs, "kvProgressIntervalMs * 10 <= kvSilenceMs"],
  [limits.storeLowWatermark < limits.storeHighWatermark, "storeLowWatermark < storeHighWatermark"],
  [limits.storeHighWatermark <= 1, "storeHighWatermark <= 1"],
  [limits.storePinTenantShare <= limits.storePinShare, "storePinTenantShare <= storePinShare"],
  [limits.conversationPinMs <= limits.storePinMs, "conversationPinMs <= storePinMs"],
  [limits.storeMessageBlocks <= limits.storePinnedBlocks, "storeMessageBlocks <= storePinnedBlocks"],
  [limits.storePinShare < limits.storeLowWatermark, "storePinShare < storeLowWatermark"],
  [limits.storeFlushDeadlineMs + limits.busDrainDeadlineMs < limits.shutdownDeadlineMs, "storeFlushDeadlineMs + busDrainDeadlineMs < shutdownDeadlineMs"],
  // A supervisor kills a process after half of it.
  [limits.storeFlushDeadlineMs * 2 < limits.shutdownDeadlineMs, "storeFlushDeadlineMs * 2 < shutdownDeadlineMs"],
  [limits.storeDeadlineMs * 2 <= limits.storePutDeadlineMs, "storeDeadlineMs * 2 <= storePutDeadlineMs"],
  [limits.leaveDeadlineMs * 2 < limits.shutdownDeadlineMs, "leaveDeadlineMs * 2 < shutdownDeadlineMs"],
  [limits.movedKvMs * 2 < limits.leaveDeadlineMs, "movedKvMs * 2 < leaveDeadlineMs"],
  [limits.moveSpacingMs < limits.movedKvMs, "moveSpacingMs < movedKvMs"],
  [limits.storePeerDeadlineMs * 2 < limits.storeDeadlineMs, "storePeerDeadlineMs * 2 < storeDeadlineMs"],
  [limits.storeAnswerMs < limits.storeDeadlineMs, "storeAnswerMs < storeDeadlineMs"],
  [limits.streamWindowFrames <= limits.streamBacklogFrames, "streamWindowFrames <= streamBacklogFrames"],
  [limits.placementDeadlineMs <= limits.requestDeadlineMs, "placementDeadlineMs <= requestDeadlineMs"],
  [limits.stepTokens <= limits.prefillQueueTokens, "stepTokens <= prefillQueueTokens"],
  [limits.maxBatch <= limits.mixedStepTokens, "maxBatch <= mixedStepTokens"],
  [limits.mixedStepTokens <= limits.stepTokens, "mixedStepTokens <= stepTokens"],
  [limits.maxBatch <= limits.stepOutputs, "maxBatch <= stepOutputs"],
  [limits.choices < limits.maxBatch, "choices < maxBatch"],
  [limits.askDeadlineMs < limits.placementLeaseMs, "askDeadlineMs < placementLeaseMs"],
  [limits.storedResponseSweepMs * 10 <= limits.storedResponseMs, "storedResponseSweepMs * 10 <= storedResponseMs"],
  [limits.webSocketTurnBytes <= limits.storedResponseBytes, "webSocketTurnBytes <= storedResponseBytes"],
  [limits.clientKeepAliveMs * 2 <= limits.clientStallMs, "clientKeepAliveMs * 2 <= clientStallMs"],
]

for (const [holds, relation] of relations) {
  if (!holds) throw new Error(`config/limits.ts: ${relation} does not hold`)
}
