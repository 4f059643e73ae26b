// What objects of nvcc's ask of CUDA's runtime, for a device of sm_90 whose memory is this process's: what they launch
// is handed to binaries.py. Linked into the library of those objects, in the runtime's place.
#include <cuda_runtime_api.h>
#include <stdint.h>
#include <stdio.h>

#include <map>
#include <string>

namespace {

// Runs a kernel of this (mangled) name; otherwise not 0, and why.
using Launched = int (*)(const char* kernel, unsigned x, unsigned y, unsigned z, unsigned threads, void** arguments,
                         uint64_t shared, char* message, uint64_t size);

constexpr size_t kShared = 48 * 1024, kMostShared = 227 * 1024;

struct Kernel {
    std::string name;
    size_t shared = kShared;  // dynamic, as much as a launch may ask for
};

struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};  // of the launch that a kernel's host function is about to make

// Registered before this file's own objects may be there.
std::map<const void*, Kernel>& kernels() {
    static std::map<const void*, Kernel> all;
    return all;
}

Launched launched;
Configuration configuration;
cudaError_t last = cudaSuccess;
char message[2000];

cudaError_t refuse(cudaError_t error, const std::string& why) {
    snprintf(message, sizeof message, "%s", why.c_str());
    return last = error;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared) {
    const auto found = kernels().find(function);
    if (found == kernels().end()) return refuse(cudaErrorInvalidDeviceFunction, "no kernel");
    const Kernel& kernel = found->second;
    const bool grid_fits = grid.x && grid.y && grid.z && grid.x < 1u << 31 && grid.y < 1 << 16 && grid.z < 1 << 16;
    if (!grid_fits || block.x < 1 || block.x > 1024 || block.y != 1 || block.z != 1)
        return refuse(cudaErrorInvalidConfiguration, kernel.name + ": a grid or a block that CUDA refuses");
    if (shared > kernel.shared)
        return refuse(cudaErrorInvalidValue, kernel.name + ": more shared memory than was allowed");
    if (!launched) return refuse(cudaErrorNotReady, "nobody runs launches");
    const int failed =
        launched(kernel.name.c_str(), grid.x, grid.y, grid.z, block.x, arguments, shared, message, sizeof message);
    return failed ? last = cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace

extern "C" {

void set_launched(Launched function) { launched = function; }

void** __cudaRegisterFatBinary(void* binary) {
    static void* held;
    held = binary;
    return &held;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    kernels()[function].name = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
    *static_cast<cudaStream_t*>(stream) = configuration.stream;
    return cudaSuccess;
}

// A kernel's handle is its function on the host.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
    return launch(kernel, grid, block, arguments, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
    for (unsigned i = 0; i < config->numAttrs; ++i)
        if (config->attrs[i].id != cudaLaunchAttributeProgrammaticStreamSerialization)
            return refuse(cudaErrorNotSupported, "another attribute of a launch");
    return launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    const auto found = kernels().find(function);
    if (found == kernels().end()) return refuse(cudaErrorInvalidDeviceFunction, "no kernel");
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
        return refuse(cudaErrorNotSupported, "another attribute of a kernel");
    if (value < 0 || static_cast<size_t>(value) > kMostShared)
        return refuse(cudaErrorInvalidValue, "more shared memory than there is");
    found->second.shared = value;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    *attributes = {};
    attributes->ptxVersion = attributes->binaryVersion = 90;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetLastError() {
    const cudaError_t error = last;
    last = cudaSuccess;
    return error;
}
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "" : message; }
}
