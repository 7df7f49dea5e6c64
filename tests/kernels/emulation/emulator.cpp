// Runs a kernel block by block, or pair by pair; the threads of a block are fibers in one operating system thread.
//
// A shuffle or __syncwarp waits for all 32 lanes, __syncthreads for all threads of the block that still
// run. Where that can never come true (lanes diverged, or left before a shuffle), the run fails instead of
// hanging. Shared memory starts as NaN, and a guard behind it shows writes past its end.
#include <csetjmp>
#include <cstdint>
#include <memory>
#include <string>
#include <ucontext.h>
#include <utility>
#include <vector>

#include "cuda_shim.h"

Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr int WARP = 32;
constexpr std::size_t STACK_BYTES = 128 * 1024, SHARED_BYTES = 227 * 1024, GUARD_BYTES = 4096;
enum State { READY, AT_WARP_BARRIER, AT_BLOCK_BARRIER, POLLING, DONE };

struct Fiber {
    State state;
    bool started;
    unsigned exchanges, arrivals;  // at the barrier of a pair
    jmp_buf resume;
    std::unique_ptr<char[]> stack;
};

struct Kernel {
    void* function;
    void** arguments;
    int count;
} kernel;

struct alignas(1024) Shared {
    unsigned char bytes[SHARED_BYTES + GUARD_BYTES];
} shared[2];               // of the blocks that run side by side
std::vector<Fiber> fibers;  // of the first one, then of the second
std::vector<unsigned> slots;  // [2, threads]: values on exchange, of even and odd exchanges
std::vector<unsigned> wide_slots;  // [2, threads, 8]: the same for fragments
int threads, current, live[2];  // threads of a block
unsigned first_block;  // of those that run side by side
bool arrived;          // whether a thread came to a barrier of its pair in this turn of all threads
jmp_buf scheduler;
std::string problem;

template <std::size_t>
using Pointer = void*;
constexpr int MAX_ARGUMENTS = 20;

template <std::size_t... I>
void call_with(std::index_sequence<I...>) {
    reinterpret_cast<void (*)(Pointer<I>...)>(kernel.function)(kernel.arguments[I]...);
}

// Calls the kernel if it has N arguments, or else tries one fewer.
template <int N>
void call() {
    if (kernel.count == N) return call_with(std::make_index_sequence<N>());
    if constexpr (N > 1) return call<N - 1>();
    problem = "no kernel has " + std::to_string(kernel.count) + " arguments";
}

void release_block(int block) {
    const auto begin = fibers.begin() + block * threads, end = begin + threads;
    int waiting = 0;
    for (auto fiber = begin; fiber != end; ++fiber) waiting += fiber->state == AT_BLOCK_BARRIER;
    if (waiting == live[block] && waiting > 0)
        for (auto fiber = begin; fiber != end; ++fiber)
            if (fiber->state == AT_BLOCK_BARRIER) fiber->state = READY;
}

void fiber_main() {
    call<MAX_ARGUMENTS>();
    fibers[current].state = DONE;
    --live[current / threads];
    release_block(current / threads);
    _longjmp(scheduler, 1);
}

void yield(State state) {
    Fiber& fiber = fibers[current];
    fiber.state = state;
    if (state == AT_BLOCK_BARRIER) {
        release_block(current / threads);
    } else if (state == AT_WARP_BARRIER) {
        const int first = current / WARP * WARP;
        int waiting = 0;
        for (int i = first; i < first + WARP; ++i) waiting += fibers[i].state == AT_WARP_BARRIER;
        if (waiting == WARP)
            for (int i = first; i < first + WARP; ++i) fibers[i].state = READY;
    }
    if (!_setjmp(fiber.resume)) _longjmp(scheduler, 1);
}

void resume(int thread) {
    Fiber& fiber = fibers[thread];
    current = thread;
    threadIdx = {static_cast<unsigned>(thread % threads), 0, 0};
    blockIdx.x = first_block + thread / threads;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    setcontext(&context);
}

// One turn for each thread of a warp that can go on; false if none can. A warp goes as far as it can before
// the next one starts, so that only a barrier makes it see what others write.
bool run_warp(int warp, bool backwards) {
    bool progress = false;
    for (int i = 0; i < WARP; ++i) {
        const int thread = warp * WARP + (backwards ? WARP - 1 - i : i);
        if (fibers[thread].state != READY) continue;
        resume(thread);
        progress |= fibers[thread].state != POLLING;
    }
    return progress;
}

void run_blocks(int count, bool backwards, std::size_t shared_bytes) {
    std::memset(shared, 0xff, count * sizeof *shared);
    for (Fiber& fiber : fibers)
        fiber.state = READY, fiber.started = false, fiber.exchanges = 0, fiber.arrivals = 0;
    live[0] = threads, live[1] = count > 1 ? threads : 0;
    const int warps = count * threads / WARP;
    while (live[0] + live[1] > 0) {
        bool progress = arrived = false;
        for (Fiber& fiber : fibers)
            if (fiber.state == POLLING) fiber.state = READY;
        for (int i = 0; i < warps; ++i)
            while (run_warp(backwards ? warps - 1 - i : i, backwards)) progress = true;
        if (!progress && !arrived) {
            problem = "threads wait for others that never come to the same shuffle or barrier";
            return;
        }
    }
    for (int block = 0; block < count; ++block)
        for (std::size_t i = shared_bytes; i < sizeof shared->bytes; ++i)
            if (shared[block].bytes[i] != 0xff) {
                problem = "dynamic shared memory was written past its " + std::to_string(shared_bytes) + " bytes";
                return;
            }
}

}  // namespace

namespace emulation {

void* dynamic_shared() { return shared[current / threads].bytes; }
void block_barrier() { yield(AT_BLOCK_BARRIER); }
void warp_barrier() { yield(AT_WARP_BARRIER); }
void wait_for_others() { yield(POLLING); }
void pair_arrive() { ++fibers[current].arrivals, arrived = true; }

void pair_wait() {
    const unsigned mine = fibers[current].arrivals;
    const auto missing = [&] {
        for (const Fiber& fiber : fibers)
            if (fiber.state != DONE && fiber.arrivals < mine) return true;
        return false;
    };
    while (missing()) yield(POLLING);
}

void* in_pair(void* own, int rank) {
    const std::ptrdiff_t offset = static_cast<unsigned char*>(own) - shared[current / threads].bytes;
    if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(SHARED_BYTES)) problem = "no place in shared memory";
    return shared[rank].bytes + offset;
}

unsigned exchange(unsigned value, int source, bool relative) {
    // Two sets of slots: a lane can be one exchange ahead of those that still read the last one.
    unsigned* const set = slots.data() + fibers[current].exchanges++ % 2 * fibers.size();
    set[current] = value;
    yield(AT_WARP_BARRIER);
    return set[relative ? current ^ source : current / WARP * WARP + source % WARP];
}

void gather(const unsigned* values, int count, unsigned (*all)[8]) {
    // Two sets, as for exchanges.
    unsigned* const set = wide_slots.data() + fibers[current].exchanges++ % 2 * fibers.size() * 8;
    std::memcpy(set + current * 8, values, count * sizeof *values);
    yield(AT_WARP_BARRIER);
    std::memcpy(all, set + current / WARP * WARP * 8, WARP * 8 * sizeof *values);
}

void check_alignment(const void* address, std::size_t bytes) {
    if (reinterpret_cast<std::uintptr_t>(address) % bytes) problem = "a load is not aligned to its size";
}

}  // namespace emulation

// Launches a kernel whose `count` arguments are pointers. backwards: run each block's threads last to first. together:
// neighbouring blocks that run side by side, 1 or 2.
// Returns null, or what went wrong. Not reentrant.
extern "C" const char* emulation_launch(void* function, void** arguments, int count, const unsigned* grid,
                                        unsigned block, std::size_t shared_bytes, int backwards, int together) {
    problem.clear();
    kernel = {function, arguments, count};
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block, 1, 1};
    threads = static_cast<int>(block);
    if (block % WARP) return "the block is not a multiple of 32 threads";
    if (shared_bytes > SHARED_BYTES) return "more dynamic shared memory than a GPU has";
    if (grid[0] % together) return "a block has no neighbour";
    const std::size_t all = block * together;
    while (fibers.size() < all) fibers.push_back({READY, false, 0, 0, {}, std::make_unique<char[]>(STACK_BYTES)});
    fibers.resize(all);
    slots.assign(2 * all, 0);
    wide_slots.assign(16 * all, 0);
    for (unsigned y = 0; y < grid[1] && problem.empty(); ++y)
        for (unsigned x = 0; x < grid[0] && problem.empty(); x += together) {
            blockIdx = {x, y, 0}, first_block = x;
            run_blocks(together, backwards != 0, shared_bytes);
        }
    return problem.empty() ? nullptr : problem.c_str();
}
