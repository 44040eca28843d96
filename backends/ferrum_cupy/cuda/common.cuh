// What every kernel of this backend shares: stored numbers, reductions, sixteen bytes at a time.
//
// STORAGE 0: float32, 1: float16, 2: bfloat16. Arithmetic is float32; a result is rounded once, to nearest even.
// No header is included, so any NVRTC compiles this; FERRUM_HOST is set where the tests compile it for a CPU.
// Clauses: BK-CUPY-* (specs/backend_cupy.md).

typedef long long i64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define WARP 32
#define FULL 0xffffffffu
#define INFINITE __int_as_float(0x7f800000)

#ifndef FERRUM_HOST
__device__ __forceinline__ float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ __forceinline__ u16 float_to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

__device__ __forceinline__ float bfloat_to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }
__device__ __forceinline__ u16 float_to_bfloat(float value) {
#if !defined(FERRUM_HOST) && __CUDA_ARCH__ >= 800
    u16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
    return rounded;
#else
    u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)((bits >> 16) | 0x40u);  // a NaN stays one
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

#if STORAGE == 0
typedef float T;
__device__ __forceinline__ float widen(T value) { return value; }
__device__ __forceinline__ T narrow(float value) { return value; }
#elif STORAGE == 1
typedef u16 T;
__device__ __forceinline__ float widen(T value) { return half_to_float(value); }
__device__ __forceinline__ T narrow(float value) { return float_to_half(value); }
#else
typedef u16 T;
__device__ __forceinline__ float widen(T value) { return bfloat_to_float(value); }
__device__ __forceinline__ T narrow(float value) { return float_to_bfloat(value); }
#endif

// x sigmoid(x); one exponential, and below -80, where it is nearly subnormal, its root twice; -0 at -inf
__device__ __forceinline__ float silu_of(float x) {
    float shrunk = expf(-fabsf(x));
    if (x < -80.0f) {
        if (x == -INFINITE) return -0.0f;
        float root = expf(x * 0.5f);
        return x * root * root;
    }
    return __fdividef(x < 0.0f ? x * shrunk : x, 1.0f + shrunk);
}

// Sixteen bytes: what one thread moves in one instruction, as four words. Callers see to the alignment.
#if STORAGE == 0
#define PACK 4
#else
#define PACK 8
#endif
#define WORDS 4
struct __align__(16) Pack {
    u32 word[WORDS];
};
__device__ __forceinline__ Pack load_pack(const T* from) { return *(const Pack*)from; }
__device__ __forceinline__ void store_pack(T* to, const Pack& pack) { *(Pack*)to = pack; }

// What is read once: it does not stay in the first cache, nor does it wait for stores to the same memory.
__device__ __forceinline__ Pack load_once(const void* from) {
#ifdef FERRUM_HOST
    return *(const Pack*)from;
#else
    Pack pack;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(pack.word[0]), "=r"(pack.word[1]), "=r"(pack.word[2]), "=r"(pack.word[3])
                 : "l"(__cvta_generic_to_global(from)));
    return pack;
#endif
}

// Copies into shared memory that go on beside other work, in groups that end with `end_of_copies`. A thread that has awaited
// its groups but the last LEFT sees its own copies, and after a barrier everybody's.
template <int BYTES>
__device__ __forceinline__ void copy_later(void* to, const void* from) {
#if defined(FERRUM_HOST) || __CUDA_ARCH__ < 800
    for (int i = 0; i < BYTES / 4; i++) ((u32*)to)[i] = ((const u32*)from)[i];
#else
    u32 place = (u32)__cvta_generic_to_shared(to);
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(place), "l"(__cvta_generic_to_global(from)) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(place), "l"(__cvta_generic_to_global(from)) : "memory");
#endif
}
__device__ __forceinline__ void end_of_copies() {
#if !defined(FERRUM_HOST) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int LEFT>
__device__ __forceinline__ void await_copies_but() {
#if !defined(FERRUM_HOST) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

// The numbers in a word, the lower address first, and back, rounded.
#if STORAGE == 0
#define IN_WORD 1
__device__ __forceinline__ void widen_word(u32 word, float* values) { values[0] = __uint_as_float(word); }
__device__ __forceinline__ u32 narrow_word(const float* values) { return __float_as_uint(values[0]); }
#else
#define IN_WORD 2
__device__ __forceinline__ void widen_word(u32 word, float* values) {
#if STORAGE == 1
    values[0] = half_to_float((u16)word), values[1] = half_to_float((u16)(word >> 16));
#else
    values[0] = __uint_as_float(word << 16), values[1] = __uint_as_float(word & 0xffff0000u);
#endif
}
__device__ __forceinline__ u32 narrow_word(const float* values) {
#if !defined(FERRUM_HOST) && __CUDA_ARCH__ >= 800
    u32 word;
#if STORAGE == 1
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[1]), "f"(values[0]));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[1]), "f"(values[0]));
#endif
    return word;
#else
    return (u32)narrow(values[0]) | (u32)narrow(values[1]) << 16;
#endif
}
#endif
__device__ __forceinline__ void widen_pack(const Pack& pack, float* values) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) widen_word(pack.word[i], values + i * IN_WORD);
}
__device__ __forceinline__ Pack narrow_pack(const float* values) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < WORDS; i++) pack.word[i] = narrow_word(values + i * IN_WORD);
    return pack;
}

__device__ __forceinline__ float warp_sum(float value) {
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(FULL, value, step);
    return value;
}
__device__ __forceinline__ float warp_max(float value) {
    for (int step = WARP / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(FULL, value, step));
    return value;
}

// Sum or maximum over a block of whole warps; every thread gets it. `scratch` holds one float a warp and is free after.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
    value = warp_sum(value);
    int warps = blockDim.x / WARP;
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    float total = 0.0f;
    for (int warp = 0; warp < warps; warp++) total += scratch[warp];
    __syncthreads();
    return total;
}
__device__ __forceinline__ float block_max(float value, float* scratch) {
    value = warp_max(value);
    int warps = blockDim.x / WARP;
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    float largest = scratch[0];
    for (int warp = 1; warp < warps; warp++) largest = fmaxf(largest, scratch[warp]);
    __syncthreads();
    return largest;
}
