#include "layer_events.h"

namespace penstock {

std::shared_ptr<LayerEvents> LayerEvents::open(Napi::Env env) {
  const auto events = std::make_shared<LayerEvents>();
  // Kept until the runtime has let go of it; it may do so before `close`, when the environment ends.
  auto* kept = new std::shared_ptr<LayerEvents>(events);
  events->wake_ = Wake::New(
      env, "penstock.layers", kMostQueued, 1, events.get(),
      [](Napi::Env, std::shared_ptr<LayerEvents>* kept, LayerEvents* events) {
        {
          std::lock_guard<std::mutex> lock(events->mutex_);
          events->wake_.reset();
        }
        delete kept;
      },
      kept);
  events->wake_->Unref(env);  // the step keeps the event loop going, and nothing else needs to
  return events;
}

void LayerEvents::begin(Napi::Function on_layer) {
  start();
  delivered_ = 0;
  thrown_.reset();
  on_layer_ = Napi::Persistent(on_layer);
}

std::optional<Napi::Error> LayerEvents::end(Napi::Env env) {
  deliver(env);
  on_layer_.Reset();
  return std::exchange(thrown_, std::nullopt);
}

void LayerEvents::close() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (wake_) wake_->Release();
  wake_.reset();
}

void LayerEvents::changed() {
  std::lock_guard<std::mutex> lock(mutex_);
  // A full queue is as good as a call. One that closes must not be called again.
  if (wake_ && wake_->NonBlockingCall() == napi_closing) wake_.reset();
}

void LayerEvents::woken(Napi::Env env, Napi::Function, LayerEvents* events, void*) {
  if (env != nullptr) events->deliver(env);
}

// A call that was queued for an earlier step finds none, or does the work of one that is to come.
void LayerEvents::deliver(Napi::Env env) {
  while (!on_layer_.IsEmpty() && !thrown_ && delivered_ < done()) {
    Napi::HandleScope scope(env);
    try {
      on_layer_.Call({Napi::Number::New(env, delivered_++)});
    } catch (const Napi::Error& error) {
      thrown_ = error;
    }
  }
}

}  // namespace penstock
