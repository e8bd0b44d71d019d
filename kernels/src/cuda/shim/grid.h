// Runs a whole grid, its blocks on all of the machine's cores in no particular order.
#pragma once

#include "block.h"

namespace penstock::shim {

void run_grid(Dim3 grid, Dim3 threads, size_t shared_bytes, uint32_t seed, const Block::Kernel& kernel);

template <class Body>
void run_grid(Dim3 grid, Dim3 threads, size_t shared_bytes, uint32_t seed, const Body& body) {
  run_grid(grid, threads, shared_bytes, seed,
           Block::Kernel{[](void* context) { (*static_cast<const Body*>(context))(); }, const_cast<Body*>(&body)});
}

}  // namespace penstock::shim
