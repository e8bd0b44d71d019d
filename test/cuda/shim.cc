// The shim itself: what it runs as CUDA does, and what it catches.
#include "check.h"

#include "../../kernels/src/cuda/language/async_copy.h"
#include "../../kernels/src/cuda/language/mma.h"
#include "../../kernels/src/cuda/language/overlap.h"
#include "../../kernels/src/cuda/launch.h"
#include "../../kernels/src/cuda/shim/grid.h"
#include "../../kernels/src/fixed_math.h"

namespace penstock::cuda::test {

namespace {

template <class Body>
void run(unsigned blocks, unsigned threads, size_t shared_bytes, uint32_t seed, Body body) {
  shim::run_grid({blocks}, {threads}, shared_bytes, seed, body);
}

// The sum of each block's numbers; without its barrier where that is planted.
void sum_blocks(const std::vector<float>& x, std::vector<float>& sums, uint32_t seed, bool missing_barrier) {
  run(static_cast<unsigned>(sums.size()), 256, 8 * sizeof(float), seed, [&] {
    PENSTOCK_SHARED(shared);
    float* parts = reinterpret_cast<float*>(shared);
    float value = x[blockIdx.x * 256 + threadIdx.x];
    for (unsigned distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    if (!missing_barrier) __syncthreads();
    if (threadIdx.x == 0) {
      float sum = 0.0f;
      for (int i = 0; i < 8; ++i) sum += parts[i];
      sums[blockIdx.x] = sum;
    }
  });
}

Add sums("the shim: blocks sum over warps, shuffles and shared memory, whatever the order of warps", [] {
  Random random(1);
  const std::vector<float> x = normals(random, 64 * 256);
  std::vector<float> first(64), again(64);
  sum_blocks(x, first, 1, false);
  for (uint32_t seed = 2; seed < 12; ++seed) {
    sum_blocks(x, again, seed, false);
    expect(again == first, "seed " + std::to_string(seed) + " gives the same sums");
  }
  double sum = 0.0;
  for (int i = 0; i < 256; ++i) sum += x[i];
  expect(std::fabs(sum - first[0]) < 1e-4, "the first sum is right");
});

Add missing("the shim: a missing barrier that is planted is caught", [] {
  Random random(1);
  const std::vector<float> x = normals(random, 64 * 256);
  std::vector<float> sums(64);
  sum_blocks(x, sums, 1, true);
  int caught = 0;
  for (float sum : sums) caught += std::isnan(sum);
  // Warp 0 is the last of eight in one order of eight.
  expect(caught > 40, "most blocks read shared memory before it is written; " + std::to_string(caught) + " of 64 did");
});

Add poison("the shim: shared memory is full of NaN when a block begins", [] {
  std::vector<float> seen(4 * 32);
  run(4, 32, 32 * sizeof(float), 1, [&] {
    PENSTOCK_SHARED(shared);
    float* numbers = reinterpret_cast<float*>(shared);
    seen[blockIdx.x * 32 + threadIdx.x] = numbers[threadIdx.x];
    numbers[threadIdx.x] = 1.0f;
  });
  for (float value : seen) expect(std::isnan(value), "nothing is left of the block before");
});

__global__ void careful_kernel(int* out) {
  begin_kernel();
  *out = 1;
}
__global__ void careless_kernel(int* out, int awaits) {
  if (threadIdx.x < static_cast<unsigned>(awaits)) await_previous();
  *out = 1;
}

Add overlap("the shim: a thread that ends without having waited for the kernels before is reported", [] {
  Bench bench;
  int* out = bench.room<int>(1);
  const Queue queue = bench.queue();
  launch(queue.device, queue.stream, "careful", careful_kernel, {1}, {64}, 0, out);
  launch(queue.device, queue.stream, "careful", careless_kernel, {1}, {64}, 0, out, 64);
  queue.device.synchronise(queue.stream);
  launch(queue.device, queue.stream, "careless", careless_kernel, {1}, {64}, 0, out, 63);
  expect_error("careless: a thread ends without await_previous", [&] { queue.device.synchronise(queue.stream); });
});

Add deadlock("the shim: a barrier that not all threads reach is reported with where they wait", [] {
  expect_error("its threads wait for each other: thread ", [] {
    run(1, 64, 0, 1, [] {
      if (threadIdx.x < 32) {
        __syncthreads();
        __syncthreads();
      } else {
        __syncwarp();
        if (threadIdx.x == 32) (void)__shfl_sync(0xffffffffu, 1, 0);
        __syncthreads();
      }
    });
  });
});

Add mixed("the shim: lanes of a warp that meet in different operations are reported", [] {
  expect_error("lanes of a warp meet in", [] {
    run(1, 32, 0, 1, [] {
      if (threadIdx.x % 2 == 0) {
        __syncwarp();
      } else {
        (void)__ballot_sync(kAllLanes, true);
      }
    });
  });
});

Add gone("the shim: a shuffle with a lane that has ended is reported", [] {
  expect_error("waits for a lane that has ended", [] {
    run(1, 32, 0, 1, [] {
      if (threadIdx.x == 5) return;
      // Lane 5 ends at the latest when the others have come; one more round is certain to see it.
      __syncwarp(0xffffffdfu);
      (void)__shfl_xor_sync(kAllLanes, 1, 1);
    });
  });
});

Add ballots("the shim: ballots and masked shuffles see the lanes of their mask", [] {
  std::vector<uint32_t> votes(32), values(32);
  run(1, 32, 0, 3, [&] {
    votes[threadIdx.x] = __ballot_sync(kAllLanes, threadIdx.x % 3 == 0);
    if (threadIdx.x < 8) values[threadIdx.x] = __shfl_sync(0xffu, threadIdx.x * 10, 7 - threadIdx.x);
  });
  expect(votes[0] == 0x49249249u && votes[31] == votes[0], "every third lane has voted");
  for (unsigned i = 0; i < 8; ++i) expect(values[i] == 10 * (7 - i), "lanes have changed places");
});

Add copies("the shim: an asynchronous copy has arrived when it was waited for; in some blocks at once, in others not before", [] {
  constexpr unsigned kBlocks = 40;
  std::vector<float> first(kBlocks * 32), second(kBlocks * 32), half(kBlocks * 32), late(kBlocks * 32);
  alignas(16) const float from[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  run(kBlocks, 32, 32 * 32, 1, [&] {
    PENSTOCK_SHARED(shared);
    float* mine = reinterpret_cast<float*>(shared + threadIdx.x * 32);
    const unsigned i = blockIdx.x * 32 + threadIdx.x;
    copy_async16(mine, from, true);
    close_copy_group();
    copy_async16(mine + 4, from + 4, threadIdx.x % 2 == 0);
    close_copy_group();
    first[i] = mine[0];
    await_copies<1>();
    half[i] = mine[3];
    second[i] = mine[4];
    await_copies<0>();
    late[i] = mine[7];
  });
  unsigned at_once = 0;
  for (unsigned i = 0; i < kBlocks * 32; ++i) {
    expect(std::isnan(first[i]) == std::isnan(second[i]), "a block does all of its copies the same way");
    at_once += !std::isnan(first[i]);
    expect(half[i] == 4.0f && late[i] == (i % 2 == 0 ? 8.0f : 0.0f), "it has come after that, zeros where nothing was there");
  }
  expect(at_once > 5 * 32 && at_once < 35 * 32, "both happen; at once in " + std::to_string(at_once / 32) + " of 40 blocks");
  expect_error("before its copies to shared memory have been waited for", [&] {
    run(1, 32, 32 * 16, 1, [&] {
      PENSTOCK_SHARED(shared);
      copy_async16(shared + threadIdx.x * 16, from, true);
    });
  });
});

Add tensor_cores("the shim: mma, on fragments that ldmatrix has loaded, is the product of the matrices", [] {
  Random random(2);
  const std::vector<uint16_t> a = halves(normals(random, 16 * 16));
  const std::vector<uint16_t> b = halves(normals(random, 16 * 8));
  std::vector<float> plain(16 * 8), transposed(16 * 8);
  run(1, 32, (16 * 16 + 2 * 16 * 16) * 2, 5, [&] {
    PENSTOCK_SHARED(shared);
    uint16_t* left = reinterpret_cast<uint16_t*>(shared);  // [16, 16]
    uint16_t* rows = left + 256;                           // [16 of which 8, 16] b transposed
    uint16_t* columns = rows + 256;                        // [16, 16 of which 8] b
    for (int i = threadIdx.x; i < 256; i += 32) {
      left[i] = a[i];
      const int r = i / 16, c = i % 16;
      rows[i] = r < 8 ? b[c * 8 + r] : 0;
      columns[i] = c < 8 ? b[r * 8 + c] : 0;
    }
    __syncwarp();
    const int lane = threadIdx.x;
    uint32_t fa[4], fb[4];
    load_matrices(fa, left + (lane % 8 + lane / 8 % 2 * 8) * 16 + lane / 16 * 8);
    float d[4] = {};
    load_matrices(fb, rows + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
    mma_m16n8k16(d, fa, fb[0], fb[1]);
    float e[4] = {};
    load_matrices_transposed(fb, columns + (lane % 8 + lane / 8 % 2 * 8) * 16 + lane / 16 * 8);
    mma_m16n8k16(e, fa, fb[0], fb[1]);
    for (int i = 0; i < 4; ++i) {
      const int at = (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2;
      plain[at] = d[i];
      transposed[at] = e[i];
    }
  });
  expect(plain == transposed, "loading rows and loading transposed give the same");
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 8; ++c) {
      double sum = 0.0;
      for (int k = 0; k < 16; ++k) sum += double(float_of_half(a[r * 16 + k])) * float_of_half(b[k * 8 + c]);
      expect(std::fabs(sum - plain[r * 8 + c]) < 1e-5, "element " + std::to_string(r) + ", " + std::to_string(c) + " is right");
    }
  }
});

Add half_math("halves of the shim are those of fixed_math.h, all of them", [] {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const float value = float_of_half(half);
    if (std::isnan(value)) continue;
    expect(half_to_float(half) == value && float_to_half(value) == half, "half " + std::to_string(bits));
  }
});

}  // namespace

}  // namespace penstock::cuda::test
