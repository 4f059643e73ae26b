// The launch function of the S pass for ctypes.
#include "cuda/lora.h"

using namespace peftfast;

extern "C" const char* lora_shrink(const void* x, const void* w, int32_t x_dtype, int32_t w_dtype, int32_t dtype,
                                   int64_t rows, int64_t columns, int64_t ranks, int64_t stride_x, int64_t stride_w,
                                   const void* seed, int64_t threshold, float scale, int64_t splits, void* partials,
                                   void* out) {
    const cuda::Shrink shrink = {x,
                                 w,
                                 static_cast<DType>(x_dtype),
                                 static_cast<DType>(w_dtype),
                                 static_cast<DType>(dtype),
                                 rows,
                                 columns,
                                 ranks,
                                 stride_x,
                                 stride_w,
                                 static_cast<const int64_t*>(seed),
                                 static_cast<uint32_t>(threshold),
                                 scale,
                                 splits,
                                 static_cast<float*>(partials),
                                 out};
    return cuda::launch_lora_shrink(shrink, nullptr);
}
