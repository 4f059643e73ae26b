// The thread pool as the kernels see it: the binding hands in torch's own, so that the kernels name no torch.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include <new>

namespace peftfast::cpu {

using RangeBody = void (*)(int64_t begin, int64_t end, void* context);

// Runs body over disjoint ranges that cover [0, count), each of at least `grain` but the last.
using ParallelFor = void (*)(int64_t count, int64_t grain, RangeBody body, void* context);

template <class Function>
void parallel_for(ParallelFor pool, int64_t count, int64_t grain, const Function& function) {
    if (count == 0) return;
    const RangeBody body = [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Function*>(context))(begin, end);
    };
    void* context = const_cast<void*>(static_cast<const void*>(&function));
    if (count <= grain) {  // one range: not worth the way through the pool
        body(0, count, context);
        return;
    }
    pool(count, grain, body, context);
}

// Scratch aligned to a cache line, which is also the widest vector.
template <class T>
class Scratch {
  public:
    explicit Scratch(int64_t count) {
        const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
        data_ = static_cast<T*>(aligned_alloc(64, bytes));
        if (data_ == nullptr) throw std::bad_alloc();
    }
    ~Scratch() { free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T* get() const { return data_; }

  private:
    T* data_;
};

}  // namespace peftfast::cpu
