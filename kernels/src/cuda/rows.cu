#include "kernels/rows.cuh"
#include "kernels/sampling.cuh"
#include "launch.h"
#include "launchers.h"

namespace penstock::cuda {

namespace {
constexpr size_t kSumShared = kNormThreads / 32 * sizeof(float);

unsigned parts(int count, int of) { return static_cast<unsigned>((count + of - 1) / of); }
}

void embed(const Queue& queue, const StepRows& step, int rows, const EmbedArguments& arguments) {
  launch(queue.device, queue.stream, "embed", embed_kernel, {static_cast<unsigned>(rows)}, {kRowThreads}, 0, arguments.embedding, step.tokens,
         step.positions, arguments.frequencies, arguments.pairs, arguments.x, arguments.x_stride, static_cast<float2*>(arguments.angles));
}

void rms_norm(const Queue& queue, int rows, const NormArguments& arguments) {
  launch(queue.device, queue.stream, "rms_norm", rms_norm_kernel, {static_cast<unsigned>(rows)}, {kNormThreads}, kSumShared, arguments.x, arguments.z,
         arguments.x_stride, arguments.rows, arguments.weight, arguments.length, arguments.epsilon, arguments.y, arguments.y_stride);
}

void swiglu(const Queue& queue, int rows, const float* gate, const float* up, size_t stride, int length, uint16_t* y, size_t y_stride) {
  launch(queue.device, queue.stream, "swiglu", swiglu_kernel, {static_cast<unsigned>(rows), parts(length, kRowThreads)}, {kRowThreads}, 0, gate, up,
         stride, length, y, y_stride);
}

void rotate_and_store(const Queue& queue, const KvView& kv, int layer, const StepRows& step, int rows, const StoreArguments& arguments) {
  const RotateAndStore in = {arguments.projected,
                             arguments.stride,
                             arguments.key_offset,
                             arguments.value_offset,
                             static_cast<const float2*>(arguments.angles),
                             arguments.rotary,
                             arguments.heads,
                             step.positions,
                             step.table_starts,
                             step.tables,
                             arguments.queries};
  launch(queue.device, queue.stream, "rotate_and_store", rotate_and_store_kernel,
         {static_cast<unsigned>(rows), parts(arguments.heads + 2 * kv.kv_heads, kStoreWarps)}, {kStoreWarps * 32},
         kStoreWarps * kMostStoredDim * sizeof(float), kv, layer, in);
}

void draw_tokens(const Queue& queue, const float* logits, size_t stride, int vocabulary, const DrawOrder* orders, int count, int32_t* tokens) {
  launch(queue.device, queue.stream, "draw_tokens", draw_tokens_kernel, {static_cast<unsigned>(count)}, {kDrawThreads}, draw_shared_bytes(vocabulary),
         logits, stride, vocabulary, orders, tokens);
}

void pack_blocks(const Queue& queue, const KvView& kv, const MoveArguments& a) {
  launch(queue.device, queue.stream, "pack_blocks", move_blocks_kernel<true>, {static_cast<unsigned>(a.pieces)}, {kRowThreads}, 0, kv, a.blocks,
         a.count, a.first_layer, a.first, static_cast<uint4*>(a.packed));
}

void unpack_blocks(const Queue& queue, const KvView& kv, const MoveArguments& a) {
  launch(queue.device, queue.stream, "unpack_blocks", move_blocks_kernel<false>, {static_cast<unsigned>(a.pieces)}, {kRowThreads}, 0, kv, a.blocks,
         a.count, a.first_layer, a.first, static_cast<uint4*>(a.packed));
}

void copy_blocks(const Queue& queue, const KvView& from, const KvView& to, const CopyArguments& a) {
  launch(queue.device, queue.stream, "copy_blocks", copy_blocks_kernel, {static_cast<unsigned>(a.count * a.layers)}, {kRowThreads}, 0, from, to,
         a.from, a.to, a.count, a.first_layer);
}

}  // namespace penstock::cuda
