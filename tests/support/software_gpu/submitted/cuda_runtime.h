// The emulator's header, whose launches go to their stream: at once, and again where a graph was captured.
#pragma once

#define launch launch_at_once
#include "../../cuda_emulator/cuda_runtime.h"
#undef launch

extern "C" void software_gpu_submit(void* stream, const char* what, void (*function)(void*), void* context);

namespace emulated {

inline void launch(dim3 grid, unsigned threads, size_t shared, cudaStream_t stream, const std::function<void()>& body) {
    const size_t allowed = shared_allowed;
    // Kept: a graph may hold it.
    auto* kept = new std::function<void()>([=] {
        shared_allowed = allowed;
        launch_at_once(grid, threads, shared, stream, body);
    });
    software_gpu_submit(
        stream, "csrc/cuda", [](void* context) { (*static_cast<std::function<void()>*>(context))(); }, kept);
}

}  // namespace emulated
