// Enough of CUDA's language for the kernels of this backend to run on a CPU, deterministically, one block after another.
//
// Every thread of a block is a fiber; they take turns in order of their index and change over at barriers and shuffles.
// A barrier that some live threads of the block never reach, and a shuffle with a lane that has ended, stop the run with
// a message. Shared memory that a kernel declares keeps what the last block left in it.
#define FERRUM_HOST 1
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <tuple>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct Index {
    unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace host {
enum State { READY, AT_BARRIER, AT_SHUFFLE, ENDED };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    State state = READY;
    float posted = 0.0f;
};
static std::vector<Fiber> fibers;
static std::vector<float> snapshot;  // what the lanes of each warp posted at their last shuffle
static ucontext_t scheduler;
static unsigned current;
static std::string fault;
static void (*body)();
const unsigned WARP_SIZE = 32;
const size_t STACK_BYTES = 64 << 10;

static void give_way(State state) {
    unsigned self = current;
    fibers[self].state = state;
    swapcontext(&fibers[self].context, &scheduler);
    threadIdx.x = self;
}
static float exchange(float value, unsigned lane) {
    unsigned warp = current / WARP_SIZE;
    fibers[current].posted = value;
    give_way(AT_SHUFFLE);
    return snapshot[warp * WARP_SIZE + lane];
}
static void start() {
    body();
    fibers[current].state = ENDED;
}
static bool release_warps() {
    bool moved = false;
    for (unsigned base = 0; base < fibers.size(); base += WARP_SIZE) {
        unsigned waiting = 0, ended = 0;
        for (unsigned lane = 0; lane < WARP_SIZE; lane++) {
            waiting += fibers[base + lane].state == AT_SHUFFLE;
            ended += fibers[base + lane].state == ENDED;
        }
        if (waiting && ended) {
            fault = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) +
                    "): a shuffle of warp " + std::to_string(base / WARP_SIZE) + " misses lanes that have ended";
            return false;
        }
        if (waiting != WARP_SIZE) continue;
        for (unsigned lane = 0; lane < WARP_SIZE; lane++) {
            snapshot[base + lane] = fibers[base + lane].posted;
            fibers[base + lane].state = READY;
        }
        moved = true;
    }
    return moved;
}
static bool release_block() {
    unsigned waiting = 0, ended = 0;
    for (auto& fiber : fibers) waiting += fiber.state == AT_BARRIER, ended += fiber.state == ENDED;
    if (!waiting || waiting + ended != fibers.size()) return false;
    if (ended) {
        fault = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) +
                "): " + std::to_string(ended) + " of " + std::to_string(fibers.size()) + " threads ended before a barrier that others reached";
        return false;
    }
    for (auto& fiber : fibers) fiber.state = READY;
    return true;
}
static void run_block() {
    for (unsigned i = 0; i < fibers.size(); i++) {
        Fiber& fiber = fibers[i];
        fiber.state = READY;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, start, 0);
    }
    for (bool moved = true; moved && fault.empty();) {
        moved = false;
        for (unsigned i = 0; i < fibers.size(); i++) {
            if (fibers[i].state != READY) continue;
            current = i;
            threadIdx = {i, 0, 0};
            swapcontext(&scheduler, &fibers[i].context);
            moved = true;
        }
        moved = (release_warps() || release_block() || moved) && fault.empty();
    }
    if (!fault.empty()) return;
    for (auto& fiber : fibers)
        if (fiber.state != ENDED) {
            fault = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) +
                    "): threads wait for each other at a barrier and at a shuffle";
            return;
        }
}
// Runs a kernel over a grid; returns null, or what went wrong.
template <typename... A, size_t... I>
const char* launch(void (*kernel)(A...), const unsigned* grid, unsigned threads, void** given, std::index_sequence<I...>) {
    static std::tuple<A...> arguments;
    static void (*chosen)(A...);
    arguments = std::tuple<A...>(*(A*)given[I]...);
    chosen = kernel;
    body = [] { std::apply(chosen, arguments); };
    fault.clear();
    if (threads == 0 || threads % WARP_SIZE) return "the number of threads is no multiple of a warp";
    fibers.resize(threads);
    snapshot.assign(threads, 0.0f);
    for (auto& fiber : fibers)
        if (fiber.stack.size() != STACK_BYTES) fiber.stack.resize(STACK_BYTES);
    blockDim = {threads, 1, 1};
    gridDim = {grid[0], grid[1], grid[2]};
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                blockIdx = {x, y, z};
                run_block();
                if (!fault.empty()) return fault.c_str();
            }
    return nullptr;
}
template <typename... A>
const char* launch(void (*kernel)(A...), const unsigned* grid, unsigned threads, void** given) {
    return launch(kernel, grid, threads, given, std::index_sequence_for<A...>{});
}
}  // namespace host

#define LAUNCHER(name)                                                                              \
    extern "C" const char* launch_##name(const unsigned* grid, unsigned threads, void** given) {    \
        return host::launch(name, grid, threads, given);                                            \
    }

static inline void __syncthreads() { host::give_way(host::AT_BARRIER); }
static inline float __shfl_xor_sync(unsigned, float value, int mask) {
    return host::exchange(value, (host::current % host::WARP_SIZE) ^ (unsigned)mask);
}
static inline float __shfl_sync(unsigned, float value, int lane) { return host::exchange(value, (unsigned)lane % host::WARP_SIZE); }

static inline float __int_as_float(int bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline float __uint_as_float(unsigned bits) { return __int_as_float((int)bits); }
static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
static inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
static inline float half_to_float(unsigned short bits) {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return (float)value;
}
static inline unsigned short float_to_half(float value) {
    _Float16 narrow = (_Float16)value;
    unsigned short bits;
    memcpy(&bits, &narrow, 2);
    return bits;
}
static inline float __fdividef(float a, float b) { return a / b; }
// Byte i of the result is byte (selector >> 4i & 7) of the eight of b, a.
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    unsigned long long bytes = (unsigned long long)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= (unsigned)(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return result;
}
