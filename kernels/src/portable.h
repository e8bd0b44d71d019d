// For functions that the host's code and CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define PENSTOCK_BOTH __host__ __device__
#else
#define PENSTOCK_BOTH
#endif
