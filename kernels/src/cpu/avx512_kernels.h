// The AVX-512 forms of the functions in Kernels; what is missing here is AVX2's, being no bottleneck.
#pragma once

#include "kernels.h"

namespace penstock::avx512 {

void swiglu(const float* gate, const float* up, int padded, float* y);
void quantise(const float* x, int length, QuantisedRow row);
void linear(const Matrix& matrix, int first, int last, const LinearInput& input, float* out, size_t out_stride, uint8_t* scratch);
void attend(const KeyTile& tile, QueryRow* rows, int count, int head_dim, float* scratch);
void attend_coded(const KeyTile& tile, QueryRow* rows, int count, int head_dim, float* scratch);

}  // namespace penstock::avx512
