// The seam between the engine and the kernels: one function for each thing that is done, which chooses kernels and shapes of grids.
// Everything is put onto a stream; pointers are into device memory.
#pragma once

#include "device.h"
#include "draw_order.h"
#include "kv_view.h"
#include "matrix_layout.h"
#include "prefill_task.h"

namespace penstock::cuda {

// A place to put work.
struct Queue {
  Device& device;
  StreamHandle stream;
};

// Rows of a step. `rows` of everything but what says otherwise.
struct StepRows {
  const int32_t* tokens;
  const int32_t* positions;     // -1: a row that is not there
  const int32_t* table_starts;  // where a row's block table begins
  const int32_t* tables;
};

struct EmbedArguments {
  DeviceMatrix embedding;
  const double* frequencies;  // [pairs]
  int pairs;
  float* x;                   // [rows, x_stride]
  size_t x_stride;
  void* angles;               // [rows, pairs] two floats each
};
void embed(const Queue& queue, const StepRows& step, int rows, const EmbedArguments& arguments);

struct NormArguments {
  float* x;              // [rows, x_stride] gains z, but where `rows` is there
  const float* z;        // or null
  size_t x_stride;
  const int32_t* rows;   // which rows of x; null: all in order
  const float* weight;   // [length]
  int length;
  float epsilon;
  uint16_t* y;           // [rows, y_stride]
  size_t y_stride;
};
void rms_norm(const Queue& queue, int rows, const NormArguments& arguments);

void swiglu(const Queue& queue, int rows, const float* gate, const float* up, size_t stride, int length, uint16_t* y, size_t y_stride);

struct LinearInput {
  const uint16_t* x;  // [rows, stride]
  size_t stride;
  int rows;
};
// Room where blocks of one product leave sums for others to add; without it they share less.
struct Partials {
  void* at = nullptr;
  size_t bytes = 0;
};
// What a product of so many outputs takes of it.
size_t partial_bytes(int outputs, int inputs);

// Products of any kinds that share their input.
void linear(const Queue& queue, const Product* products, int count, const LinearInput& input, const Partials& partials);
void linear_few(const Queue& queue, const Product* products, int count, const LinearInput& input);
void linear_many(const Queue& queue, const Product* products, int count, const LinearInput& input, const Partials& partials);

struct StoreArguments {
  const float* projected;  // [rows, stride]
  size_t stride;
  size_t key_offset;
  size_t value_offset;
  const void* angles;
  int rotary;
  int heads;
  uint16_t* queries;  // [rows, heads, head_dim]
};
void rotate_and_store(const Queue& queue, const KvView& kv, int layer, const StepRows& step, int rows, const StoreArguments& arguments);

// Tokens of a unit of attention, and the greatest head there is a kernel for.
int attention_unit(int head_dim);
constexpr int kMostAttentionDim = 256;
int prefill_queries(int head_dim);  // of a task

struct AttentionArguments {
  const uint16_t* queries;
  uint16_t* out;  // [rows, out_stride]
  size_t out_stride;
  int heads;
};
// Single rows. `split` blocks share the units of one.
struct DecodeArguments {
  const int32_t* rows;         // [count]
  const int32_t* unit_starts;  // [count]
  int count;
  int split;
  float* totals;  // [units, heads, head_dim]
  float* states;  // [units, heads, 2]
};
void attend_decode(const Queue& queue, const KvView& kv, int layer, const StepRows& step, const AttentionArguments& arguments,
                   const DecodeArguments& decode);
void attend_prefill(const Queue& queue, const KvView& kv, int layer, const StepRows& step, const AttentionArguments& arguments,
                    const PrefillTask* tasks, int count);

// A token, or why there is none, for each order.
void draw_tokens(const Queue& queue, const float* logits, size_t stride, int vocabulary, const DrawOrder* orders, int count, int32_t* tokens);
constexpr int kMostVocabulary = 1 << 20;

// Layers of blocks, counted [layer][block] from `first`, out of the pool or into it.
struct MoveArguments {
  const int32_t* blocks;  // [count]
  int count;
  int first_layer;
  int first;
  int pieces;
  void* packed;
};
void pack_blocks(const Queue& queue, const KvView& kv, const MoveArguments& arguments);
void unpack_blocks(const Queue& queue, const KvView& kv, const MoveArguments& arguments);

// From a pool to another of the same device, or within one, whose blocks hold the same.
struct CopyArguments {
  const int32_t* from;  // [count]
  const int32_t* to;    // [count]
  int count;
  int first_layer;
  int layers;
};
void copy_blocks(const Queue& queue, const KvView& from, const KvView& to, const CopyArguments& arguments);

}  // namespace penstock::cuda
