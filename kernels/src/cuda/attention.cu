#include <cmath>

#include "kernels/attention.cuh"
#include "launch.h"
#include "launchers.h"

namespace penstock::cuda {

namespace {

// Calls `body` with the smallest head size there are kernels for that has room.
template <class Body>
void with_dim(int head_dim, Body body) {
  if (head_dim <= 32) return body.template operator()<32>();
  if (head_dim <= 64) return body.template operator()<64>();
  if (head_dim <= 80) return body.template operator()<80>();
  if (head_dim <= 96) return body.template operator()<96>();
  if (head_dim <= 128) return body.template operator()<128>();
  return body.template operator()<256>();
}

float scale_of(int head_dim) { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }

}  // namespace

int attention_unit(int head_dim) { return unit_tokens(head_dim <= 128 ? 128 : 256); }

int prefill_queries(int head_dim) { return 16 * prefill_warps(head_dim <= 128 ? 128 : 256); }

void attend_decode(const Queue& queue, const KvView& kv, int layer, const StepRows& step, const AttentionArguments& arguments,
                   const DecodeArguments& decode) {
  const DecodeRows rows = {arguments.queries, decode.rows,   step.positions,     step.table_starts, step.tables,
                           decode.unit_starts, decode.totals, decode.states,      arguments.out,     arguments.out_stride,
                           arguments.heads,    scale_of(kv.head_dim)};
  const int group = arguments.heads / kv.kv_heads;
  const Size3 grid = {static_cast<unsigned>(decode.split), static_cast<unsigned>(kv.kv_heads * ((group + 15) / 16)),
                      static_cast<unsigned>(decode.count)};
  with_dim(kv.head_dim, [&]<int kDim>() {
    launch(queue.device, queue.stream, "attend_decode", attend_decode_kernel<kDim>, grid, {kDecodeThreads}, decode_shared_bytes<kDim>(), kv, layer,
           rows);
  });
  const auto merge = attention_unit(kv.head_dim) == 128 ? merge_units_kernel<128> : merge_units_kernel<64>;
  launch(queue.device, queue.stream, "merge_units", merge, {static_cast<unsigned>(arguments.heads), static_cast<unsigned>(decode.count)},
         {static_cast<unsigned>((kv.head_dim + 31) / 32 * 32)}, 0, kv.head_dim, rows);
}

void attend_prefill(const Queue& queue, const KvView& kv, int layer, const StepRows& step, const AttentionArguments& arguments,
                    const PrefillTask* tasks, int count) {
  const PrefillRows rows = {arguments.queries, step.positions,       step.table_starts, step.tables,          tasks,
                            arguments.out,     arguments.out_stride, arguments.heads,   scale_of(kv.head_dim)};
  const Size3 grid = {static_cast<unsigned>(count), static_cast<unsigned>(kv.kv_heads)};
  with_dim(kv.head_dim, [&]<int kDim>() {
    launch(queue.device, queue.stream, "attend_prefill", attend_prefill_kernel<kDim>, grid, {prefill_warps(kDim) * 32}, prefill_shared_bytes<kDim>(),
           kv, layer, rows);
  });
}

}  // namespace penstock::cuda
