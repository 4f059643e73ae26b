// What the CUDA bindings share: the check of device and memory, and the stream that torch uses now.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "bind/checks.h"

namespace peftfast::bind {

inline void check_cuda(const Tensor& t, const char* name, int32_t device) {
    STD_TORCH_CHECK(t.is_cuda(), name, ": expected a CUDA tensor, got device type ",
                    static_cast<int>(t.device().type()));
    STD_TORCH_CHECK(t.get_device_index() == device, name, ": expected CUDA device ", device, ", got ",
                    t.get_device_index());
    check_memory(t, name);
}

// Stream::nativeHandle would need torch 2.13, and torch's own check of a status is a macro of another name in 2.11.
inline void* current_stream(int32_t device) {
    void* stream = nullptr;
    const auto status = aoti_torch_get_current_cuda_stream(device, &stream);
    STD_TORCH_CHECK(status == 0, "CUDA device ", device, ": torch did not give its current stream");
    return stream;
}

inline void check_launch(const char* error, const char* name) {
    STD_TORCH_CHECK(error == nullptr, name, ": the launch failed: ", error ? error : "");
}

}  // namespace peftfast::bind
