// The AVX2 forms of the functions in Kernels.
#pragma once

#include "kernels.h"

namespace penstock::avx2 {

void rms_norm(const float* x, const float* weight, int length, int padded, float epsilon, float* y);
void swiglu(const float* gate, const float* up, int padded, float* y);
void rotate(float* x, const float* cos, const float* sin, int length);
void to_half(const float* x, int length, uint16_t* y);
void quantise(const float* x, int length, QuantisedRow row);
void encode(const float* x, int length, int bits, uint8_t* codes, uint16_t* scale, uint16_t* zero);
void linear(const Matrix& matrix, int first, int last, const LinearInput& input, float* out, size_t out_stride, uint8_t* scratch);
void attend(const KeyTile& tile, QueryRow* rows, int count, int head_dim, float* scratch);
void attend_coded(const KeyTile& tile, QueryRow* rows, int count, int head_dim, float* scratch);
void merge(QueryRow& row, const QueryRow& tile, int head_dim);
void transpose(const WireUnit* from, size_t from_stride, int rows, int columns, WireUnit* to, size_t to_stride);

}  // namespace penstock::avx2
