// What this machine can do at most, for the shares that `bench kernels` reports: products of small integers, added up, in
// registers alone, and reads of memory. A program of its own: penstock-peaks THREADS reference|avx2|avx512
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "../src/cpu/processor.h"

#if defined(PENSTOCK_X86)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
using Work = std::function<double(int thread)>;  // one short piece; returns how much it has done

constexpr auto kPiece = std::chrono::milliseconds(100);
constexpr int kRounds = 3;
constexpr size_t kReadBytes = size_t{256} << 20;  // far beyond any cache that this is fair to

// Done a second, on all threads together; the best of a few rounds, as a peak is.
double peak(int threads, const Work& work) {
  double best = 0.0;
  for (int round = 0; round < kRounds; ++round) {
    std::vector<double> rates(threads);
    std::vector<std::thread> workers;
    std::atomic<int> ready{0};
    for (int thread = 0; thread < threads; ++thread) {
      workers.emplace_back([&, thread] {
        ready.fetch_add(1);
        while (ready.load() < threads) std::this_thread::yield();
        const auto started = Clock::now();
        double done = 0.0;
        while (Clock::now() - started < kPiece) done += work(thread);
        rates[thread] = done / std::chrono::duration<double>(Clock::now() - started).count();
      });
    }
    for (std::thread& worker : workers) worker.join();
    double sum = 0.0;
    for (double rate : rates) sum += rate;
    best = std::max(best, sum);
  }
  return best;
}

constexpr int kLoops = 10000;

#if defined(PENSTOCK_X86)
// Twelve chains hide the latency of the instruction. Written out, as gcc copies the sums around the intrinsic.
__attribute__((target("avx512f,avx512bw,avx512vnni"))) double multiply_avx512(int) {
  __m512i sums[12];
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  for (__m512i& sum : sums) sum = _mm512_setzero_si512();
  for (int loop = 0; loop < kLoops; ++loop) {
#pragma GCC unroll 12
    for (__m512i& sum : sums) asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
  return double(kLoops) * 12 * 64;
}

// A block of nibbles times int8 fits 16 bits, so that pairs are added in those. Written out, as the compiler would multiply once.
__attribute__((target("avx2"))) double multiply_avx2(int) {
  __m256i sums[10], product;
  __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
  for (__m256i& sum : sums) sum = _mm256_setzero_si256();
  for (int loop = 0; loop < kLoops; ++loop) {
#pragma GCC unroll 10
    for (__m256i& sum : sums) asm volatile("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(b));
  }
  return double(kLoops) * 10 * 32;
}
#endif

// Compiled for any processor, like the reference kernels.
double multiply_plain(int) {
  int32_t sums[16] = {};
  int32_t a = 3, b = 5;
  for (int loop = 0; loop < kLoops; ++loop) {
    asm volatile("" : "+r"(a), "+r"(b));
    for (int32_t& sum : sums) sum += a * b;
  }
  for (int32_t& sum : sums) asm volatile("" : "+r"(sum));
  return double(kLoops) * 16;
}

double read_slice(const uint64_t* from, size_t words) {
  uint64_t sums[8] = {};
  for (size_t i = 0; i + 8 <= words; i += 8) {
    for (int lane = 0; lane < 8; ++lane) sums[lane] += from[i + lane];
  }
  for (uint64_t& sum : sums) asm volatile("" : "+r"(sum));
  return double(words) * 8;
}

}  // namespace

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::atoi(arguments[1]) : 0;
  const std::string isa = count > 2 ? arguments[2] : "";
  if (threads < 1 || threads > 1024 || isa.empty()) {
    std::fprintf(stderr, "penstock-peaks: expected THREADS reference|avx2|avx512\n");
    return 2;
  }
  Work multiply = multiply_plain;
#if defined(PENSTOCK_X86)
  if (isa == "avx512" && penstock::processor().avx512) multiply = multiply_avx512;
  else if (isa != "reference" && penstock::processor().avx2) multiply = multiply_avx2;
#endif
  const size_t words = kReadBytes / 8;
  const std::unique_ptr<uint64_t[]> memory(new uint64_t[words]);
  for (size_t i = 0; i < words; ++i) memory[i] = i;
  const size_t slice = words / threads;
  const double macs = peak(threads, multiply);
  const double bytes = peak(threads, [&](int thread) { return read_slice(memory.get() + thread * slice, slice); });
  std::printf("{\"peakGmacPerS\":%.1f,\"peakReadGbPerS\":%.2f}\n", macs / 1e9, bytes / 1e9);
  return 0;
}
