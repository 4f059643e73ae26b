// One spelling for functions that g++ and nvcc both compile, so that the CPU tests run what the GPU runs.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define PEFTFAST_HD __host__ __device__ __forceinline__
#else
#define PEFTFAST_HD inline
#endif
