// The launch functions of the nf4 family for ctypes.
#include "cuda/nf4.h"

using namespace peftfast;

static cuda::Nf4Weight weight_of(const void* packed, const void* absmax, const void* code, const void* nested_absmax,
                                 const void* nested_code, const void* nested_offset, int64_t block_size,
                                 int64_t count) {
    return {static_cast<const uint8_t*>(packed),
            absmax,
            static_cast<const float*>(code),
            static_cast<const float*>(nested_absmax),
            static_cast<const float*>(nested_code),
            static_cast<const float*>(nested_offset),
            block_size,
            count};
}

extern "C" const char* nf4_dequantize(const void* packed, const void* absmax, const void* code,
                                      const void* nested_absmax, const void* nested_code, const void* nested_offset,
                                      int64_t block_size, int64_t count, int64_t begin, int64_t end, int64_t width,
                                      int64_t stride, void* out, int32_t dtype) {
    return cuda::launch_nf4_dequantize(
        weight_of(packed, absmax, code, nested_absmax, nested_code, nested_offset, block_size, count),
        {begin, end, width, stride}, out, static_cast<DType>(dtype), nullptr);
}

extern "C" const char* nf4_quantize(const void* weight, int32_t dtype, int64_t count, int64_t block_size,
                                    const void* bounds, const void* order, void* packed, void* absmax) {
    return cuda::launch_nf4_quantize(weight, static_cast<DType>(dtype), count, block_size,
                                     static_cast<const float*>(bounds), static_cast<const uint8_t*>(order),
                                     static_cast<uint8_t*>(packed), static_cast<float*>(absmax), nullptr);
}

extern "C" const char* nf4_nest(const void* values, int64_t count, const void* bounds, int32_t snapped, void* index,
                                void* absmax) {
    return cuda::launch_nf4_nest(static_cast<const float*>(values), count, static_cast<const float*>(bounds),
                                 snapped != 0, static_cast<uint8_t*>(index), static_cast<float*>(absmax), nullptr);
}

extern "C" const char* nf4_linear(const void* packed, const void* absmax, const void* code, const void* nested_absmax,
                                  const void* nested_code, const void* nested_offset, int64_t block_size, int64_t M,
                                  int64_t N, int64_t K, int64_t R, const void* x, int32_t x_dtype, const void* bias,
                                  int32_t bias_dtype, const void* lora_a, int32_t a_dtype, const void* lora_b,
                                  int32_t b_dtype, const void* lora_bias, int32_t lora_bias_dtype, float scaling,
                                  int32_t compute, int64_t warps, void* partial, void* s, void* y, int32_t y_dtype) {
    cuda::Nf4Linear p = {};
    p.M = M, p.N = N, p.K = K, p.R = R;
    p.x = x, p.x_dtype = static_cast<DType>(x_dtype);
    p.weight = weight_of(packed, absmax, code, nested_absmax, nested_code, nested_offset, block_size, N * K);
    p.bias = bias, p.bias_dtype = static_cast<DType>(bias_dtype);
    p.lora_a = lora_a, p.a_dtype = static_cast<DType>(a_dtype);
    p.lora_b = lora_b, p.b_dtype = static_cast<DType>(b_dtype);
    p.lora_bias = lora_bias, p.lora_bias_dtype = static_cast<DType>(lora_bias_dtype);
    p.scaling = scaling, p.compute = static_cast<DType>(compute), p.warps = warps;
    p.partial = static_cast<float*>(partial), p.s = s, p.y = y, p.y_dtype = static_cast<DType>(y_dtype);
    return cuda::launch_nf4_linear(p, nullptr);
}

extern "C" int64_t nf4_linear_scratch(int64_t M, int64_t N, int64_t K, int64_t R, int64_t warps) {
    return cuda::Nf4LinearShares(M, N, K, R, warps).scratch;
}
