// Tensor cores behind a small wrapper: the instructions of PTX under nvcc, and what they compute in the shim.
//
// PTX ISA, sections "Matrix fragments for mma.m16n8k16 with floating point type" and "ldmatrix".
#pragma once

#include "half.h"

namespace penstock::cuda {

// d = a b + d of f16 products and f32 sums, over a warp. With g = lane / 4 and t = lane % 4 a lane holds, of
//   a [16, 16]  a[0] = (g, 2t … 2t+1), a[1] = (g+8, 2t …), a[2] = (g, 2t+8 …), a[3] = (g+8, 2t+8 …)
//   b [16, 8]   b[0] = (2t … 2t+1, g), b[1] = (2t+8 …, g)
//   d [16, 8]   d[0 … 1] = (g, 2t … 2t+1), d[2 … 3] = (g+8, 2t …)
// An element of d depends on its row of a and its column of b and on nothing else, so rows and columns that are padding cost
// time but change nothing.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  struct Fragments {
    uint32_t a[4];
    uint32_t b[2];
    float* d;
  } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}, d};
  shim::Block::current().meet(
      kAllLanes, &mine,
      [](void* const* lanes, uint32_t) {
        alignas(32) float left[16][16], right[16][8], sums[16][8];
        const auto put = [](uint32_t bits, float* first, float* second) {
          *first = half_to_float(static_cast<uint16_t>(bits));
          *second = half_to_float(static_cast<uint16_t>(bits >> 16));
        };
        for (int lane = 0; lane < 32; ++lane) {
          const auto& from = *static_cast<const Fragments*>(lanes[lane]);
          const int g = lane / 4;
          const int t = 2 * (lane % 4);
          for (int i = 0; i < 4; ++i) put(from.a[i], &left[g + i % 2 * 8][t + i / 2 * 8], &left[g + i % 2 * 8][t + i / 2 * 8 + 1]);
          for (int i = 0; i < 2; ++i) put(from.b[i], &right[t + 8 * i][g], &right[t + 8 * i + 1][g]);
          for (int i = 0; i < 4; ++i) sums[g + i / 2 * 8][t + i % 2] = from.d[i];
        }
        for (int row = 0; row < 16; ++row) {
          for (int k = 0; k < 16; ++k) {
            for (int column = 0; column < 8; ++column) sums[row][column] = std::fma(left[row][k], right[k][column], sums[row][column]);
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          const auto& to = *static_cast<const Fragments*>(lanes[lane]);
          for (int i = 0; i < 4; ++i) to.d[i] = sums[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
        }
      },
      "mma");
#endif
}

#if !defined(__CUDACC__)
namespace shim_detail {

struct LoadedRow {
  const uint16_t* row;
  uint32_t* out;  // [4]
};

inline void combine_ldmatrix(void* const* lanes, bool transposed) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto element = [&](int row, int column) -> uint32_t {
        return static_cast<const LoadedRow*>(lanes[8 * matrix + row])->row[column];
      };
      const int g = lane / 4;
      const int t = 2 * (lane % 4);
      static_cast<LoadedRow*>(lanes[lane])->out[matrix] =
          transposed ? element(t, g) | element(t + 1, g) << 16 : element(g, t) | element(g, t + 1) << 16;
    }
  }
}

inline void check_row(const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) throw std::runtime_error("ldmatrix: a row is not aligned to 16 bytes");
}

}  // namespace shim_detail
#endif

// Four matrices of [8, 8] halves in shared memory, lane 8i + j giving where row j of matrix i begins. A lane gets elements
// (g, 2t … 2t+1) of each, or (2t … 2t+1, g) where they are transposed.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
#if defined(__CUDACC__)
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#else
  shim_detail::check_row(row);
  shim_detail::LoadedRow mine = {static_cast<const uint16_t*>(row), out};
  shim::Block::current().meet(
      kAllLanes, &mine, [](void* const* lanes, uint32_t) { shim_detail::combine_ldmatrix(lanes, false); }, "ldmatrix");
#endif
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
#if defined(__CUDACC__)
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#else
  shim_detail::check_row(row);
  shim_detail::LoadedRow mine = {static_cast<const uint16_t*>(row), out};
  shim::Block::current().meet(
      kAllLanes, &mine, [](void* const* lanes, uint32_t) { shim_detail::combine_ldmatrix(lanes, true); }, "ldmatrix.trans");
#endif
}

}  // namespace penstock::cuda
