// Putting a kernel onto a stream. For launchers only, which both compilers compile.
#pragma once

#include <tuple>
#include <type_traits>

#include "device.h"
#include "language/language.h"

#if !defined(__CUDACC__)
#include "shim/grid.h"
#endif

namespace penstock::cuda {

// `arguments` are copied now; pointers among them are into device memory.
template <class... Parameters>
void launch(Device& device, StreamHandle stream, const char* name, void (*kernel)(Parameters...), Size3 grid, Size3 threads,
            size_t shared_bytes, std::type_identity_t<Parameters>... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#if defined(__CUDACC__)
  void* pointers[] = {&arguments...};
  device.launch({name, grid, threads, shared_bytes, reinterpret_cast<const void*>(kernel), pointers, nullptr}, stream);
#else
  auto run = [=](uint32_t seed) {
    const std::tuple<Parameters...> values(arguments...);
    shim::run_grid({grid.x, grid.y, grid.z}, {threads.x, threads.y, threads.z}, shared_bytes, seed,
                   [&] {
                     std::apply(kernel, values);
                     if (!shim::Block::current().thread().awaited) throw std::runtime_error("a thread ends without await_previous");
                   });
  };
  device.launch({name, grid, threads, shared_bytes, nullptr, nullptr, std::move(run)}, stream);
#endif
}

}  // namespace penstock::cuda
