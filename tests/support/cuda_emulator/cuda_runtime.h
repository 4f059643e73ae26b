// CUDA kernels on a CPU, one block after the other: each thread is a fiber, and a fiber that reaches a barrier or a
// warp's collective hands on to the next until all have come. Slow and exact; what it cannot show is timing and races
// between barriers. Takes the place of CUDA's own header, for the tests.
//
// A fiber is begun once, by makecontext, and serves the thread of its number in every block; from then on it is left
// and entered by _setjmp and _longjmp, which make no system call where swapcontext makes one for the mask of signals.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

typedef void* cudaStream_t;
typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t picked = 0;
    for (int i = 0; i < 4; ++i) picked |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
    return picked;
}
inline float __fadd_rn(float a, float b) { return a + b; }  // compiled with -ffp-contract=off
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

namespace emulated {

[[noreturn]] inline void fail(const char* what) {
    fprintf(stderr, "emulated kernel: %s\n", what);
    abort();
}

inline dim3 thread_index, block_index, grid_size;

// What a launch may ask for, and a mark behind what it asked for.
constexpr size_t kMostShared = 227 * 1024, kMark = 64;
inline size_t shared_allowed = 48 * 1024;
// Each library's own, where races.cpp looks for shared memory.
__attribute__((visibility("hidden"))) alignas(16) inline char dynamic_shared[kMostShared + kMark];

// races.cpp, where it is linked, is shown what a kernel reads and writes, and no more than that.
inline bool in_kernel = false;
__attribute__((no_sanitize_thread)) inline void set_in_kernel(bool value) { in_kernel = value; }
#ifdef EMULATED_RACES
void begin_launch(), begin_block(), end_launch();
#else
inline void begin_launch() {}
inline void begin_block() {}
inline void end_launch() {}
#endif

// What orders one thread's accesses after another's.
struct Place {
    unsigned thread;
    uint64_t barriers, syncs;  // passed by the block, and by the thread's warp
};

class Block {
  public:
    explicit Block(unsigned threads) : threads_(threads), warps_((threads + 31) / 32) {
        while (fibers().size() < threads) fibers().push_back(new Fiber);
    }

    void run(const std::function<void()>& body) {
        begin_block();
        body_ = &body;
        current_ = this;
        alive_ = threads_;
        for (unsigned i = 0; i < threads_; ++i) fibers()[i]->done = false;
        while (alive_ > 0) {
            const uint64_t before = events_;
            for (running_ = 0; running_ < threads_; ++running_) {
                Fiber& fiber = *fibers()[running_];
                if (fiber.done) continue;
                thread_index = dim3(running_);
                leave(scheduler_, fiber);
            }
            if (events_ == before) fail("threads wait for each other for ever");
        }
    }

    static Block& current() { return *current_; }
    unsigned lane() const { return running_ % 32; }
    Place place() const { return {running_, generation_, warps_[running_ / 32].syncs}; }
    // Not a kernel's to share: the running thread's stack, and what says which block runs.
    bool is_own(const void* p) const {
        const char *stack = fibers()[running_]->stack, *at = static_cast<const char*>(p);
        return (at >= stack && at < stack + kStack) || p == static_cast<const void*>(&current_);
    }

    void barrier() {
        set_in_kernel(false);
        const uint64_t mine = generation_;
        ++events_;
        ++arrived_;
        release();
        while (generation_ == mine) yield();
        set_in_kernel(true);
    }

    // The values that the warp's 32 lanes bring. Memory is in order afterwards where `orders`.
    template <class T>
    const T* exchange(const T& value, bool orders = false) {
        set_in_kernel(false);
        static_assert(sizeof(T) <= kSlot, "");
        Warp& warp = warps_[running_ / 32];
        const uint64_t mine = warp.generation;
        T* values = reinterpret_cast<T*>(warp.values[mine % 2]);
        memcpy(values + running_ % 32, &value, sizeof(T));
        ++events_;
        if (++warp.arrived == 32) {
            warp.arrived = 0;
            ++warp.generation;
            warp.syncs += orders;
        } else {
            while (warp.generation == mine) yield();
        }
        set_in_kernel(true);
        return values;
    }

  private:
    static constexpr size_t kSlot = 32, kStack = 64 * 1024;
    struct Warp {
        uint64_t generation = 0, syncs = 0;
        unsigned arrived = 0;
        alignas(16) char values[2][32 * kSlot];
    };
    struct Fiber {
        jmp_buf at;
        char* stack = nullptr;
        bool done = false;
    };
    static std::vector<Fiber*>& fibers() {  // kept from block to block
        static std::vector<Fiber*> all;
        return all;
    }

    // From here to where the fiber was left, or to its beginning.
    __attribute__((noinline)) static void leave(jmp_buf& here, Fiber& fiber) {
        if (_setjmp(here) != 0) return;
        if (fiber.stack != nullptr) _longjmp(fiber.at, 1);
        fiber.stack = static_cast<char*>(aligned_alloc(64, kStack));
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = fiber.stack;
        context.uc_stack.ss_size = kStack;
        context.uc_link = nullptr;
        makecontext(&context, &Block::serve, 0);
        setcontext(&context);
    }

    __attribute__((noinline)) void yield_from(Fiber& fiber) {
        if (_setjmp(fiber.at) == 0) _longjmp(scheduler_, 1);
    }

    static void serve() {  // a thread of one block after the other
        while (true) {
            Block& block = *current_;
            set_in_kernel(true);
            (*block.body_)();
            set_in_kernel(false);
            Fiber& fiber = *fibers()[block.running_];
            fiber.done = true;
            --block.alive_;
            ++block.events_;
            block.release();
            block.yield_from(fiber);
        }
    }

    void release() {  // those that have returned are not waited for
        if (arrived_ > 0 && arrived_ == alive_) {
            arrived_ = 0;
            ++generation_;
        }
    }

    void yield() {
        const unsigned mine = running_;
        yield_from(*fibers()[mine]);
        thread_index = dim3(mine);
    }

    inline static Block* current_ = nullptr;
    const std::function<void()>* body_ = nullptr;
    unsigned threads_, running_ = 0, alive_ = 0, arrived_ = 0;
    uint64_t generation_ = 0, events_ = 0;
    std::vector<Warp> warps_;
    jmp_buf scheduler_;
};

inline void launch(dim3 grid, unsigned threads, size_t shared, cudaStream_t, const std::function<void()>& body) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0 || threads > 1024) fail("a grid that CUDA refuses");
    if (shared > kMostShared || (shared > 48 * 1024 && shared > shared_allowed)) fail("more shared memory than allowed");
    shared_allowed = 48 * 1024;
    memset(dynamic_shared + shared, 0x5a, kMark);
    grid_size = grid;
    begin_launch();
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                block_index = dim3(x, y, z);
                Block(threads).run(body);
            }
        }
    }
    end_launch();
    for (size_t i = 0; i < kMark; ++i) {
        if (dynamic_shared[shared + i] != 0x5a) fail("a write behind the shared memory");
    }
}

}  // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define gridDim emulated::grid_size

inline void __syncthreads() { emulated::Block::current().barrier(); }
inline void __syncwarp() { emulated::Block::current().exchange(0, true); }

template <class T>
inline T __shfl_xor_sync(uint32_t mask, T value, int distance) {
    if (mask != 0xffffffffu) emulated::fail("a collective of part of a warp");
    return emulated::Block::current().exchange(value)[emulated::Block::current().lane() ^ distance];
}

// A lane past `width`, a power of two, counts from the start of the part of the warp again.
template <class T>
inline T __shfl_sync(uint32_t mask, T value, int lane, int width = 32) {
    if (mask != 0xffffffffu) emulated::fail("a collective of part of a warp");
    const unsigned part = emulated::Block::current().lane() & ~(width - 1u), from = lane & (width - 1u);
    return emulated::Block::current().exchange(value)[part | from];
}

template <class T>
inline T __ldg(const T* p) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) emulated::fail("an address that is not aligned");
    return *p;
}
