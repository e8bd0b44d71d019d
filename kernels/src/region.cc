#include "region.h"

#include <sys/mman.h>

#include <stdexcept>
#include <utility>

namespace penstock {

namespace {
constexpr size_t kHugePage = size_t{2} << 20;
}

Region::Region(size_t bytes, const std::string& what) : bytes_(bytes) {
  if (bytes == 0) return;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
  flags |= MAP_NORESERVE;
#endif
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (base == MAP_FAILED) throw std::runtime_error(what + ": no address space for " + std::to_string(bytes) + " bytes");
  base_ = base;
#ifdef MADV_HUGEPAGE
  // Weights and KV are read from end to end: huge pages save most TLB misses. Refusal is harmless.
  if (bytes >= 4 * kHugePage) (void)madvise(base, bytes, MADV_HUGEPAGE);
#endif
}

Region::~Region() {
  if (base_ != nullptr) munmap(base_, bytes_);
}

Region::Region(Region&& other) noexcept : base_(std::exchange(other.base_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Region& Region::operator=(Region&& other) noexcept {
  std::swap(base_, other.base_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace penstock
