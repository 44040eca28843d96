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
    u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)((bits >> 16) | 0x40u);  // a NaN stays one
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
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

// Sixteen bytes: what one thread moves in one instruction. Callers see to the alignment.
#define PACK (16 / (int)sizeof(T))
struct __align__(16) Pack {
    T at[16 / sizeof(T)];
};
__device__ __forceinline__ Pack load_pack(const T* from) { return *(const Pack*)from; }
__device__ __forceinline__ void store_pack(T* to, const Pack& pack) { *(Pack*)to = pack; }

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
