// CUDA's runtime and driver on a machine without a GPU. The device is this process's memory; a stream's work is done at
// once, when it is submitted; a graph holds what was submitted while it was captured, and does it again.
#include <cuda.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

constexpr size_t kMemory = size_t{20} << 30;
constexpr int kSharedMemory = 232448;  // of a block, by opting in

struct Graph {
    std::vector<std::function<void()>> nodes;
};
struct Capture {
    Graph* graph;
    cudaStream_t origin;
    unsigned long long id;
    int mode;
    std::set<cudaStream_t> streams, unjoined;
};
struct Stream {
    int priority;
    Capture* capture = nullptr;
};
struct Event {
    unsigned flags;
    bool recorded = false;
    double milliseconds = 0;
    Capture* capture = nullptr;
    cudaStream_t stream = nullptr;
};
struct Block {
    size_t size;
    bool device;
};
struct Function {
    std::string name;
};

template <typename T>
T& kept() {  // until the end of the process, after all destructors
    static T* value = new T;
    return *value;
}
struct Blocks : std::map<uintptr_t, Block> {};
struct Streams : std::map<cudaStream_t, Stream*> {};
struct Captures : std::vector<Capture*> {};
struct KernelNames : std::map<const void*, std::string> {};
struct Reported : std::set<std::string> {};
std::recursive_mutex& mutex() { return kept<std::recursive_mutex>(); }
using Lock = std::lock_guard<std::recursive_mutex>;

size_t used = 0;
unsigned long long captures_made = 0;
thread_local int capture_mode = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last_error = cudaSuccess;
thread_local CUcontext context = nullptr;

void say(const std::string& text) { fprintf(stderr, "software GPU: %s\n", text.c_str()); }

cudaError_t refuse(cudaError_t error, const char* what) {
    say(std::string(what) + " is refused with error " + std::to_string(int(error)));
    return last_error = error;
}

Stream* stream_of(cudaStream_t stream) {
    if (stream == cudaStreamLegacy || stream == cudaStreamPerThread) stream = nullptr;
    Lock lock(mutex());
    Streams& all = kept<Streams>();
    const auto found = all.find(stream);
    if (found != all.end()) return found->second;
    return stream == nullptr ? all[nullptr] = new Stream{0} : nullptr;
}

// What no thread may call while a graph is captured, but one that has relaxed its own mode.
cudaError_t unless_capturing(const char* what) {
    Lock lock(mutex());
    if (capture_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    for (const Capture* one : kept<Captures>())
        if (one->mode == cudaStreamCaptureModeGlobal) return refuse(cudaErrorStreamCaptureUnsupported, what);
    return cudaSuccess;
}

cudaError_t submit(cudaStream_t handle, const char* what, const std::function<void()>& work) {
    {
        Lock lock(mutex());
        const Stream* stream = stream_of(handle);
        if (stream == nullptr) return refuse(cudaErrorInvalidResourceHandle, what);
        if (stream->capture) stream->capture->graph->nodes.push_back(work);
    }
    work();
    return cudaSuccess;
}

void* allocate(size_t size, bool device) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 512, size ? size : 512)) return nullptr;
    if (size < size_t{1} << 28) memset(memory, 0xFF, size);  // NaN: what is read before it is written shows
    Lock lock(mutex());
    kept<Blocks>()[reinterpret_cast<uintptr_t>(memory)] = {size, device};
    return memory;
}

cudaError_t release(void* memory) {
    if (memory == nullptr) return cudaSuccess;
    Lock lock(mutex());
    const auto found = kept<Blocks>().find(reinterpret_cast<uintptr_t>(memory));
    if (found == kept<Blocks>().end()) return refuse(cudaErrorInvalidValue, "to free what was not allocated");
    if (found->second.device) used -= found->second.size;
    kept<Blocks>().erase(found);
    free(memory);
    return cudaSuccess;
}

const Block* block_of(uintptr_t address, uintptr_t* begin) {
    auto found = kept<Blocks>().upper_bound(address);
    if (found == kept<Blocks>().begin()) return nullptr;
    --found;
    if (begin) *begin = found->first;
    return address < found->first + found->second.size ? &found->second : nullptr;
}

int attribute(int which) {
    switch (which) {
        case cudaDevAttrMaxThreadsPerBlock:
        case cudaDevAttrMaxBlockDimX:
        case cudaDevAttrMaxBlockDimY:
            return 1024;
        case cudaDevAttrMaxBlockDimZ:
            return 64;
        case cudaDevAttrMaxGridDimX:
            return 2147483647;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ:
            return 65535;
        case cudaDevAttrMaxSharedMemoryPerBlock:
            return 49152;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            return kSharedMemory;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            return kSharedMemory + 1024;
        case cudaDevAttrWarpSize:
            return 32;
        case cudaDevAttrMaxRegistersPerBlock:
            return 65536;
        case cudaDevAttrClockRate:
            return 1980000;
        case cudaDevAttrMemoryClockRate:
            return 3201000;
        case cudaDevAttrGlobalMemoryBusWidth:
            return 6144;
        case cudaDevAttrMultiProcessorCount:
            return 132;
        case cudaDevAttrL2CacheSize:
            return 60 << 20;
        case cudaDevAttrMaxThreadsPerMultiProcessor:
            return 2048;
        case cudaDevAttrComputeCapabilityMajor:
            return 9;
        case cudaDevAttrComputeCapabilityMinor:
            return 0;
        default:
            return 1;
    }
}

// A kernel of a library's own, compiled for a GPU.
cudaError_t not_run(const void* function) {
    Lock lock(mutex());
    const std::string& name = kept<KernelNames>()[function];
    if (kept<Reported>().insert(name).second) say("a kernel that cannot run: " + name);
    return cudaSuccess;
}

CUresult not_here() {
    say("an entry of the driver that is not here");
    return CUDA_ERROR_NOT_SUPPORTED;
}

using Launch = int (*)(unsigned long long function, unsigned x, unsigned y, unsigned z, void** parameters,
                       unsigned long long stream);
using Again = void (*)(int number);
Launch launch_kernel = nullptr;
Again launch_again = nullptr;

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// ---- for operators.cpp, launches.py and csrc/cuda

EXPORT void software_gpu_submit(void* stream, const char* what, void (*function)(void*), void* given) {
    submit(static_cast<cudaStream_t>(stream), what, [=] { function(given); });
}
EXPORT int software_gpu_capturing(void* handle) {
    const Stream* stream = stream_of(static_cast<cudaStream_t>(handle));
    return stream && stream->capture;
}
EXPORT void software_gpu_set_launch(Launch launch, Again again) {
    launch_kernel = launch;
    launch_again = again;
}
// Whether [begin, end) lies within one allocation.
EXPORT int software_gpu_allocated(uintptr_t begin, uintptr_t end) {
    Lock lock(mutex());
    uintptr_t first = 0;
    const Block* block = block_of(begin, &first);
    return block && end <= first + block->size;
}

// ---- devices

EXPORT cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
EXPORT cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
EXPORT cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : refuse(cudaErrorInvalidDevice, "cudaSetDevice");
}
EXPORT cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
EXPORT cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, "NVIDIA H200 (software)");
    found->totalGlobalMem = kMemory;
    found->major = 9;
    found->multiProcessorCount = 132;
    found->warpSize = 32;
    found->maxThreadsPerBlock = found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
    found->maxThreadsDim[2] = 64;
    found->maxGridSize[0] = 2147483647;
    found->maxGridSize[1] = found->maxGridSize[2] = 65535;
    found->maxThreadsPerMultiProcessor = 2048;
    found->regsPerBlock = found->regsPerMultiprocessor = 65536;
    found->sharedMemPerBlock = 49152;
    found->sharedMemPerBlockOptin = kSharedMemory;
    found->sharedMemPerMultiprocessor = kSharedMemory + 1024;
    found->l2CacheSize = 60 << 20;
    found->memoryBusWidth = 6144;
    found->concurrentKernels = found->unifiedAddressing = found->cooperativeLaunch = 1;
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
    return *value = attribute(which), cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int) {
    return snprintf(text, size, "0000:01:00.0"), cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    return *least = 0, *greatest = -5, cudaSuccess;
}
EXPORT cudaError_t cudaDeviceSynchronize() { return unless_capturing("cudaDeviceSynchronize"); }
EXPORT cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    return last_error = cudaSuccess, error;
}
EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }
EXPORT const char* cudaGetErrorString(cudaError_t error) {
    static thread_local char text[64];
    return snprintf(text, sizeof text, "error %d of the software GPU", int(error)), text;
}
EXPORT const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
EXPORT cudaError_t cudaProfilerStart() { return cudaSuccess; }
EXPORT cudaError_t cudaProfilerStop() { return cudaSuccess; }

// ---- memory

EXPORT cudaError_t cudaMalloc(void** memory, size_t size) {
    if (const auto error = unless_capturing("cudaMalloc")) return error;
    if (used + size > kMemory || (*memory = allocate(size, true)) == nullptr)
        return last_error = cudaErrorMemoryAllocation;
    used += size;
    return cudaSuccess;
}
EXPORT cudaError_t cudaFree(void* memory) {
    if (const auto error = unless_capturing("cudaFree")) return error;
    return release(memory);
}
EXPORT cudaError_t cudaHostAlloc(void** memory, size_t size, unsigned) {
    return (*memory = allocate(size, false)) ? cudaSuccess : cudaErrorMemoryAllocation;
}
EXPORT cudaError_t cudaFreeHost(void* memory) { return release(memory); }
EXPORT cudaError_t cudaHostRegister(void* memory, size_t size, unsigned) {
    Lock lock(mutex());
    kept<Blocks>()[reinterpret_cast<uintptr_t>(memory)] = {size, false};
    return cudaSuccess;
}
EXPORT cudaError_t cudaHostUnregister(void* memory) {
    Lock lock(mutex());
    kept<Blocks>().erase(reinterpret_cast<uintptr_t>(memory));
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
    return *unused = kMemory - used, *total = kMemory, cudaSuccess;
}
EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* memory) {
    memset(found, 0, sizeof *found);
    Lock lock(mutex());
    const Block* block = block_of(reinterpret_cast<uintptr_t>(memory), nullptr);
    if (block == nullptr) {
        found->device = -1;
        return cudaSuccess;
    }
    found->type = block->device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    found->devicePointer = found->hostPointer = const_cast<void*>(memory);
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
    return submit(stream, "cudaMemcpyAsync", [=] { memmove(to, from, size); });
}
EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
    if (const auto error = unless_capturing("cudaMemcpy")) return error;
    return cudaMemcpyAsync(to, from, size, kind, nullptr);
}
EXPORT cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, stream);
}
EXPORT cudaError_t cudaMemsetAsync(void* memory, int value, size_t size, cudaStream_t stream) {
    return submit(stream, "cudaMemsetAsync", [=] { memset(memory, value, size); });
}
EXPORT cudaError_t cudaMemset(void* memory, int value, size_t size) {
    return cudaMemsetAsync(memory, value, size, nullptr);
}
EXPORT cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
EXPORT cudaError_t cudaGetSymbolAddress(void** memory, const void*) {
    static void* all = calloc(1, 1 << 20);
    return *memory = all, cudaSuccess;
}

// ---- streams and events

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
    Lock lock(mutex());
    auto* made = new Stream{priority};
    *stream = reinterpret_cast<cudaStream_t>(made);
    kept<Streams>()[*stream] = made;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    Lock lock(mutex());
    kept<Streams>().erase(stream);
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamQuery(cudaStream_t handle) {
    const Stream* stream = stream_of(handle);
    if (stream == nullptr) return refuse(cudaErrorInvalidResourceHandle, "cudaStreamQuery");
    return stream->capture ? refuse(cudaErrorStreamCaptureUnsupported, "cudaStreamQuery") : cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    if (const auto error = cudaStreamQuery(handle)) return error;
    return unless_capturing("cudaStreamSynchronize");
}
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
    return *priority = stream_of(stream)->priority, cudaSuccess;
}
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    return *event = reinterpret_cast<cudaEvent_t>(new Event{flags}), cudaSuccess;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }  // a graph may wait for it still
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t on, unsigned) {
    const Stream* stream = stream_of(on);
    if (stream == nullptr) return refuse(cudaErrorInvalidResourceHandle, "cudaEventRecord");
    auto* event = reinterpret_cast<Event*>(handle);
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    event->milliseconds = std::chrono::duration<double, std::milli>(now).count();
    event->recorded = true;
    event->capture = stream->capture;
    event->stream = on;
    return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}
EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (reinterpret_cast<Event*>(event)->capture) return refuse(cudaErrorCapturedEvent, "to ask a captured event");
    return unless_capturing("cudaEventQuery");
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaEventQuery(event); }
EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t first, cudaEvent_t second) {
    const auto *a = reinterpret_cast<Event*>(first), *b = reinterpret_cast<Event*>(second);
    if (!a->recorded || !b->recorded || (a->flags | b->flags) & cudaEventDisableTiming)
        return refuse(cudaErrorInvalidResourceHandle, "cudaEventElapsedTime");
    const double between = b->milliseconds - a->milliseconds;
    return *milliseconds = between > 0 ? static_cast<float>(between) : 1e-3f, cudaSuccess;
}
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t of, unsigned) {
    Lock lock(mutex());
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return refuse(cudaErrorInvalidResourceHandle, "cudaStreamWaitEvent");
    const auto* event = reinterpret_cast<Event*>(of);
    if (event->capture && stream == stream_of(nullptr))
        return refuse(cudaErrorStreamCaptureImplicit, "the legacy stream to wait for a stream that is captured");
    if (event->capture && !stream->capture) {
        stream->capture = event->capture;
        stream->capture->streams.insert(handle);
        stream->capture->unjoined.insert(handle);
    } else if (stream->capture && event->recorded && !event->capture) {
        return refuse(cudaErrorStreamCaptureIsolation, "to wait, in a capture, for an event from outside");
    }
    if (event->capture && handle == event->capture->origin) event->capture->unjoined.erase(event->stream);
    return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* given) {
    return submit(stream, "cudaLaunchHostFunc", [=] { function(given); });
}
EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* given, unsigned) {
    return call(stream, cudaSuccess, given), cudaSuccess;
}

// ---- graphs

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    const int before = capture_mode;
    capture_mode = *mode;
    return *mode = static_cast<cudaStreamCaptureMode>(before), cudaSuccess;
}
EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
    Lock lock(mutex());
    if (handle == nullptr) return refuse(cudaErrorStreamCaptureUnsupported, "to capture the legacy stream");
    Stream* stream = stream_of(handle);
    if (stream->capture) return refuse(cudaErrorIllegalState, "to begin a capture twice");
    stream->capture = new Capture{new Graph, handle, ++captures_made, mode, {handle}, {}};
    kept<Captures>().push_back(stream->capture);
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
    Lock lock(mutex());
    Capture* capture = stream_of(handle)->capture;
    if (capture == nullptr || capture->origin != handle)
        return refuse(cudaErrorStreamCaptureUnmatched, "to end a capture that is another's");
    for (cudaStream_t each : capture->streams)
        if (Stream* one = stream_of(each)) one->capture = nullptr;
    auto& all = kept<Captures>();
    for (size_t i = all.size(); i-- > 0;)
        if (all[i] == capture) all.erase(all.begin() + i);
    *graph = nullptr;
    if (!capture->unjoined.empty()) return refuse(cudaErrorStreamCaptureUnjoined, "a side stream that did not join");
    return *graph = reinterpret_cast<cudaGraph_t>(capture->graph), cudaSuccess;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
    Lock lock(mutex());
    const Stream* stream = stream_of(handle);
    *status = cudaStreamCaptureStatusNone;
    if (stream == nullptr) return refuse(cudaErrorInvalidResourceHandle, "cudaStreamIsCapturing");
    if (handle == nullptr && !kept<Captures>().empty())
        return refuse(cudaErrorStreamCaptureImplicit, "the legacy stream while another is captured");
    if (stream->capture) *status = cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                            unsigned long long* id, cudaGraph_t* graph,
                                            const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges,
                                            size_t* count) {
    const Stream* stream = stream_of(handle);
    *status = stream && stream->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    if (*status == cudaStreamCaptureStatusNone) return cudaSuccess;
    if (id) *id = stream->capture->id;
    if (graph) *graph = reinterpret_cast<cudaGraph_t>(stream->capture->graph);
    if (dependencies) *dependencies = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
    return *made = reinterpret_cast<cudaGraphExec_t>(graph), cudaSuccess;
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t handle, cudaStream_t stream) {
    const auto* graph = reinterpret_cast<Graph*>(handle);
    return submit(stream, "cudaGraphLaunch", [=] {
        for (const auto& node : graph->nodes) node();
    });
}
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
    return *count = reinterpret_cast<Graph*>(graph)->nodes.size(), cudaSuccess;
}
EXPORT cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* count) {
    return *count = 0, cudaSuccess;
}
EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
EXPORT cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }

// ---- kernels that are compiled for a GPU: known by their names, and not run

EXPORT void** __cudaRegisterFatBinary(void*) {
    static void* handle[4];
    return handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                   int*) {
    kept<KernelNames>()[host] = name;
}
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORT unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* memory, void* stream) {
    *grid = *block = dim3();
    *memory = 0;
    *static_cast<void**>(stream) = nullptr;
    return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void**, size_t, cudaStream_t) {
    return not_run(function);
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) {
    return not_run(kernel);
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    return *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function)), cudaSuccess;
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* function, void**) {
    return not_run(function);
}
EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 32;
    found->binaryVersion = found->ptxVersion = 90;
    return cudaSuccess;
}
EXPORT cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int, size_t,
                                                                          unsigned) {
    return *count = 1, cudaSuccess;
}

// ---- the driver, as torch and Triton's launcher ask it

EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
    *entry = dlsym(RTLD_DEFAULT, name);
    if (*entry == nullptr) *entry = reinterpret_cast<void*>(not_here);
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
EXPORT CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
EXPORT CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGet(CUdevice* device, int number) { return *device = number, CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
    return *value = attribute(which), CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext* current) { return *current = context, CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetCurrent(CUcontext given) { return context = given, CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* made, CUdevice) {
    static int one;
    return *made = reinterpret_cast<CUcontext>(&one), CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
    return *flags = 0, *active = 1, CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 1 << 20, CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
EXPORT CUresult cuModuleLoadData(CUmodule* module, const void*) {
    static int one;
    return *module = reinterpret_cast<CUmodule>(&one), CUDA_SUCCESS;
}
EXPORT CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
EXPORT CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
    return *function = reinterpret_cast<CUfunction>(new Function{name}), CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
    *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
EXPORT CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
EXPORT CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
    return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorString(CUresult error, const char** text) {
    return *text = cudaGetErrorString(static_cast<cudaError_t>(error)), CUDA_SUCCESS;
}
EXPORT CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr memory) {
    if (!software_gpu_allocated(memory, memory)) return CUDA_ERROR_INVALID_VALUE;
    return *static_cast<CUdeviceptr*>(value) = memory, CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig*) {
    return *count = 66, CUDA_SUCCESS;
}

// What a launch reads of a tensor map; launches.py has the same layout.
struct TensorMap {
    uint64_t base;
    uint8_t rank, fill, unused[2];
    uint32_t box[5];
    uint64_t sizes[5];
    uint32_t strides[5];  // in bytes, of all dimensions but the first
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "");

EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap* out, CUtensorMapDataType, cuuint32_t rank, void* base,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
    if (reinterpret_cast<uintptr_t>(base) % 16) return CUDA_ERROR_INVALID_VALUE;
    TensorMap map = {};
    map.base = reinterpret_cast<uintptr_t>(base);
    map.rank = rank;
    map.fill = fill;
    for (unsigned i = 0; i < rank; ++i) {
        if (box[i] == 0 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
        map.box[i] = box[i];
        map.sizes[i] = sizes[i];
        if (i + 1 == rank) break;
        if (strides[i] % 16) return CUDA_ERROR_INVALID_VALUE;
        map.strides[i] = strides[i];
    }
    memset(out, 0, sizeof *out);
    memcpy(out, &map, sizeof map);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void**) {
    const bool grid = config->gridDimX > 0 && config->gridDimY <= 65535 && config->gridDimZ <= 65535;
    if (!grid || config->sharedMemBytes > kSharedMemory || launch_kernel == nullptr) return CUDA_ERROR_INVALID_VALUE;
    const auto handle = reinterpret_cast<unsigned long long>(config->hStream);
    const int number = launch_kernel(reinterpret_cast<unsigned long long>(function), config->gridDimX, config->gridDimY,
                                     config->gridDimZ, parameters, handle);
    if (number < 0) return CUDA_ERROR_LAUNCH_FAILED;
    Lock lock(mutex());
    const Stream* stream = stream_of(config->hStream);
    if (stream && stream->capture) stream->capture->graph->nodes.push_back([=] { launch_again(number); });
    return CUDA_SUCCESS;
}
