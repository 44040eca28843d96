// y = x W^T with W packed in ggml's blocks of 32: a warp a row of W, a lane a block, up to ROWS rows of x at once.
// Q4_0: f16 scale, 16 bytes, low nibbles first: (q - 8) d.   Q8_0: f16 scale, 32 signed bytes: q d.
// Clauses: BK-CUPY-QUANT-1, KN-QLINEAR-*.

#ifndef ROWS
#define ROWS 4
#endif
#define BLOCK 32

__device__ __forceinline__ void unpack_q4_0(const u8* block, float* weights) {
    const u16* words = (const u16*)(block + 2);  // blocks start on even addresses
    for (int i = 0; i < 8; i++) {
        u32 word = words[i];
        weights[2 * i] = (float)((int)(word & 15u) - 8);
        weights[2 * i + 16] = (float)((int)((word >> 4) & 15u) - 8);
        weights[2 * i + 1] = (float)((int)((word >> 8) & 15u) - 8);
        weights[2 * i + 17] = (float)((int)(word >> 12) - 8);
    }
}
__device__ __forceinline__ void unpack_q8_0(const u8* block, float* weights) {
    const u16* words = (const u16*)(block + 2);
    for (int i = 0; i < 16; i++) {
        weights[2 * i] = (float)(signed char)(words[i] & 255u);
        weights[2 * i + 1] = (float)(signed char)(words[i] >> 8);
    }
}

#define QUANTIZED_LINEAR(NAME, UNPACK, BYTES)                                                                      \
    extern "C" __global__ void NAME(const T* x, const u8* packed, T* y, int rows, int in, int out) {               \
        int lane = threadIdx.x % WARP, blocks = in / BLOCK, base = blockIdx.y * ROWS;                              \
        i64 row = (i64)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;                                      \
        if (row >= out) return;                                                                                    \
        int here = rows - base < ROWS ? rows - base : ROWS;                                                        \
        float sums[ROWS], weights[BLOCK];                                                                          \
        for (int r = 0; r < ROWS; r++) sums[r] = 0.0f;                                                             \
        for (int block = lane; block < blocks; block += WARP) {                                                    \
            const u8* from = packed + (row * blocks + block) * BYTES;                                              \
            float scale = half_to_float(*(const u16*)from);                                                        \
            UNPACK(from, weights);                                                                                 \
            for (int r = 0; r < ROWS; r++) {                                                                       \
                if (r >= here) break;                                                                              \
                const T* values = x + (i64)(base + r) * in + block * BLOCK;                                        \
                float sum = 0.0f;                                                                                  \
                for (int i = 0; i < BLOCK; i++) sum += weights[i] * widen(values[i]);                              \
                sums[r] += sum * scale;                                                                            \
            }                                                                                                      \
        }                                                                                                          \
        for (int r = 0; r < ROWS; r++) {                                                                           \
            float sum = warp_sum(sums[r]);                                                                         \
            if (lane == 0 && r < here) y[(i64)(base + r) * out + row] = narrow(sum);                               \
        }                                                                                                          \
    }

QUANTIZED_LINEAR(linear_q4_0, unpack_q4_0, 18)
QUANTIZED_LINEAR(linear_q8_0, unpack_q8_0, 34)
