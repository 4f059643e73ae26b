// Instructions that CUDA C++ has no name for, or none that says as much. The tests put a header of the same name in
// this one's place and run the kernels on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>

#include "narrow.h"

namespace peftfast::cuda {

// What a weight that is read once should not displace: L1 is passed by, and L2 gives these lines up first.
__device__ __forceinline__ uint64_t once_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint4 load_once(const void* p, uint64_t policy) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p), "l"(policy));
    return v;
}

// What another part of the launch reads too, but not this multiprocessor.
__device__ __forceinline__ uint4 load_past_l1(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

// The block's shared memory beyond what its kernel declares: as many bytes as the launch says, 16-byte aligned.
__device__ __forceinline__ char* dynamic_shared() {
    extern __shared__ uint4 dynamic[];
    return reinterpret_cast<char*>(dynamic);
}

// What `ask` says, asked once on each device and kept in `known`.
constexpr int kDevices = 64;
template <class Ask>
bool once_a_device(std::atomic<int> (&known)[kDevices], Ask ask) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return ask();
    int found = known[device].load(std::memory_order_relaxed);  // 0: not asked yet, 1: no, 2: yes
    if (found == 0) {
        found = ask() ? 2 : 1;
        known[device].store(found, std::memory_order_relaxed);
    }
    return found == 2;
}

// Before a launch that asks for more than 48 KB of it. Where that is refused a later launch says so itself.
template <auto kKernel>
cudaError_t allow_shared(int bytes) {
    static std::atomic<int> known[kDevices];
    cudaError_t error = cudaSuccess;
    once_a_device(known, [&] {
        error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        return error == cudaSuccess;
    });
    return error;
}

// For two launches of which the second needs the first's results: the first says when the second may begin, beside it
// and as room permits, and the second where it waits until the first has ended and what it wrote can be read. From
// sm_90 on; launch_behind makes a launch that begins so.
__device__ __forceinline__ void let_the_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_the_last() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Whether the current device runs code of such a kernel that waits: what was compiled for older devices does not. All
// kernels are compiled for the same ones, so that one is asked for all.
inline bool waits_for_the_last(const void* kernel) {
    static std::atomic<int> known[kDevices];
    return once_a_device(known, [&] {
        cudaFuncAttributes attributes;
        return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
    });
}

// A launch that begins before the one before it on the stream has ended, where its kernel waits for that.
template <class... Parameters>
cudaError_t launch_behind(void (*kernel)(Parameters...), dim3 grid, unsigned threads, cudaStream_t stream,
                          const Parameters&... arguments) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = dim3(threads), config.stream = stream;
    config.attrs = &attribute, config.numAttrs = waits_for_the_last(reinterpret_cast<const void*>(kernel)) ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Two floats, rounded to nearest even, the first in the low half.
template <DType kCompute>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<DType::bf16>(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
template <>
__device__ __forceinline__ uint32_t pack_pair<DType::f16>(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// sum[16 x 8] += a[16 x 16] b[16 x 8] over the warp, in float32 (PTX mma.m16n8k16, row-major a, column-major b).
template <DType kCompute>
__device__ __forceinline__ void multiply_tile(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply_tile<DType::bf16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                           uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_tile<DType::f16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                          uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace peftfast::cuda
