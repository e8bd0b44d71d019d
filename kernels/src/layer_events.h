// The `onLayer` of steps: compute threads count layers, and the event loop calls back.
#pragma once

#include <napi.h>

#include <memory>
#include <mutex>
#include <optional>

#include "layer_progress.h"

namespace penstock {

class LayerEvents : public LayerProgress {
 public:
  // One for an engine, used by one step after another until `close`.
  static std::shared_ptr<LayerEvents> open(Napi::Env env);

  // All on the event loop. `begin` before the step is queued, `end` when it has ended and before its promise settles: it
  // calls back for the layers that were not reported yet, and gives what the callback has thrown, after which it was not
  // called again.
  void begin(Napi::Function on_layer);
  std::optional<Napi::Error> end(Napi::Env env);
  void close();

 private:
  // Wakes the event loop. One call in the queue is enough: it reports all layers it finds, and one that is still queued has
  // not looked yet.
  static constexpr size_t kMostQueued = 1;
  static void woken(Napi::Env env, Napi::Function, LayerEvents* events, void*);
  using Wake = Napi::TypedThreadSafeFunction<LayerEvents, void, woken>;

  void changed() override;
  void deliver(Napi::Env env);

  std::mutex mutex_;          // guards wake_, which the runtime may take away while a step runs
  std::optional<Wake> wake_;  // empty once closed

  // Of the step, on the event loop.
  Napi::FunctionReference on_layer_;
  int delivered_ = 0;
  std::optional<Napi::Error> thrown_;
};

}  // namespace penstock
