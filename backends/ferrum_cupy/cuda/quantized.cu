// y = x W^T with W packed in ggml's blocks of 32: a warp a row of W, a lane a block, up to ROWS rows of x at once.
// Q4_0: f16 scale, 16 bytes, low nibbles first: (q - 8) d.   Q8_0: f16 scale, 32 signed bytes: q d.
// Below, the same for rows of W that are whole pairs of blocks, one row of x at a time: W comes through shared memory.
// Clauses: BK-CUPY-QUANT-1, BK-CUPY-42, KN-QLINEAR-*.

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

// ---- one row of x: a warp has Format::OUTPUTS rows of W, 64 blocks of each at a time, which are copied while the last ones are
// multiplied. A lane multiplies two neighbouring blocks, whose words it reads without bank conflicts since their number is
// odd. Integers become floats by their bits: 0x4b000000 | n is 2^23 + n, and what is subtracted from that is exact.
#define STREAM_WARPS 4
#define STEP_PAIRS WARP
#define STEP (STEP_PAIRS * 2 * BLOCK)
#define GROUP (2 * BLOCK)          // elements of x that a lane multiplies
#define GROUP_WORDS (GROUP / IN_WORD)
#define PITCH (WARP + 1)

template <int POSITION>
__device__ __forceinline__ float nibble(u32 word) {  // the four bits at POSITION, minus 8
    const float step = 1.0f / (1 << POSITION);
    return __uint_as_float(0x4b000000u | (word & (15u << POSITION))) * step - (8388608.0f * step + 8.0f);
}
template <int BYTE>
__device__ __forceinline__ float signed_byte(u32 flipped) {  // of a word whose sign bits are flipped
    return __uint_as_float(__byte_perm(flipped, 0x4b000000u, 0x7540u | BYTE)) - 8388736.0f;
}

struct Q4 {
    static const int PAIR_WORDS = 9, OUTPUTS = 4, DATA_WORDS = 4;
    static __device__ __forceinline__ float dot(const u32* data, const float* x) {
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < DATA_WORDS; k++) {
#pragma unroll
            for (int side = 0; side < 2; side++) {
                u32 word = side ? data[k] >> 16 : data[k];
                int i = 4 * k + 2 * side;
                sum += nibble<0>(word) * x[i];
                sum += nibble<4>(word) * x[i + 16];
                sum += nibble<8>(word) * x[i + 1];
                sum += nibble<12>(word) * x[i + 17];
            }
        }
        return sum;
    }
};
struct Q8 {
    static const int PAIR_WORDS = 17, OUTPUTS = 2, DATA_WORDS = 8;
    static __device__ __forceinline__ float dot(const u32* data, const float* x) {
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < DATA_WORDS; k++) {
            u32 word = data[k] ^ 0x80808080u;
            sum += signed_byte<0>(word) * x[4 * k];
            sum += signed_byte<1>(word) * x[4 * k + 1];
            sum += signed_byte<2>(word) * x[4 * k + 2];
            sum += signed_byte<3>(word) * x[4 * k + 3];
        }
        return sum;
    }
};

// The scaled dot product of a lane's first (SECOND 0) or second block, its words in shared memory, with 32 elements of x.
template <typename Format, int SECOND>
__device__ __forceinline__ float block_dot(const u32* pair, const float* x) {
    u32 data[Format::DATA_WORDS];
    const u32* from = pair + (SECOND ? Format::DATA_WORDS + 1 : 0);
#pragma unroll
    for (int k = 0; k < Format::DATA_WORDS; k++) data[k] = SECOND ? from[k] : from[k] >> 16 | from[k + 1] << 16;
    u16 scale = (u16)(SECOND ? from[-1] >> 16 : from[0]);
    return half_to_float(scale) * Format::dot(data, x);
}

// Row blockIdx.x of x, STREAM_WARPS * OUTPUTS rows of W from blockIdx.y on: blocks that share rows of W run side by side.
template <typename Format>
__device__ __forceinline__ void stream(
    const T* x, const u8* packed, T* y, int in, int out, u32 (*stage)[2][Format::OUTPUTS][STEP_PAIRS * Format::PAIR_WORDS],
    u32* staged_x) {
    const int step_bytes = STEP_PAIRS * Format::PAIR_WORDS * 4;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, steps = (in + STEP - 1) / STEP;
    int first = (blockIdx.y * STREAM_WARPS + warp) * Format::OUTPUTS;
    i64 row_bytes = (i64)in / GROUP * Format::PAIR_WORDS * 4;
    x += (i64)blockIdx.x * in, y += (i64)blockIdx.x * out;
    float sums[Format::OUTPUTS], values[BLOCK];
#pragma unroll
    for (int r = 0; r < Format::OUTPUTS; r++) sums[r] = 0.0f;
    for (int step = -1; step < steps; step++) {
        __syncthreads();  // everybody is done with what is overwritten now
        int next = step + 1;
        if (next < steps) {
            i64 skipped = (i64)next * step_bytes, left = row_bytes - skipped;
            int bytes = left < step_bytes ? (int)left : step_bytes;
#pragma unroll
            for (int r = 0; r < Format::OUTPUTS; r++) {
                i64 row = first + r < out ? first + r : out - 1;
                const u8* from = packed + row * row_bytes + skipped;
                u8* to = (u8*)stage[warp][next % 2][r];
                if (row_bytes % 16 == 0)
                    for (int at = lane * 16; at < bytes; at += WARP * 16) copy_later<16>(to + at, from + at);
                else
                    for (int at = lane * 4; at < bytes; at += WARP * 4) copy_later<4>(to + at, from + at);
            }
        }
        end_of_copies();
        if (step < 0) continue;
        int count = in - step * STEP < STEP ? in - step * STEP : STEP;
        for (int at = threadIdx.x * PACK; at < count; at += STREAM_WARPS * WARP * PACK) {
            Pack pack = load_pack(x + step * STEP + at);
#pragma unroll
            for (int i = 0; i < WORDS; i++) staged_x[(at % GROUP / IN_WORD + i) * PITCH + at / GROUP] = pack.word[i];
        }
        await_copies_but<1>();
        __syncthreads();
        if (lane * GROUP >= count) continue;
        const u32(*blocks)[STEP_PAIRS * Format::PAIR_WORDS] = stage[warp][step % 2];
#pragma unroll
        for (int j = 0; j < BLOCK / IN_WORD; j++) widen_word(staged_x[j * PITCH + lane], values + j * IN_WORD);
#pragma unroll
        for (int r = 0; r < Format::OUTPUTS; r++) sums[r] += block_dot<Format, 0>(blocks[r] + lane * Format::PAIR_WORDS, values);
#pragma unroll
        for (int j = 0; j < BLOCK / IN_WORD; j++)
            widen_word(staged_x[(j + BLOCK / IN_WORD) * PITCH + lane], values + j * IN_WORD);
#pragma unroll
        for (int r = 0; r < Format::OUTPUTS; r++) sums[r] += block_dot<Format, 1>(blocks[r] + lane * Format::PAIR_WORDS, values);
    }
#pragma unroll
    for (int r = 0; r < Format::OUTPUTS; r++) {
        float sum = warp_sum(sums[r]);
        if (lane == 0 && first + r < out) y[first + r] = narrow(sum);
    }
}

#define STREAM(NAME, FORMAT)                                                                                        \
    extern "C" __global__ void __launch_bounds__(STREAM_WARPS* WARP)                                                \
        NAME(const T* x, const u8* packed, T* y, int in, int out) {                                                 \
        __shared__ __align__(16) u32 stage[STREAM_WARPS][2][FORMAT::OUTPUTS][STEP_PAIRS * FORMAT::PAIR_WORDS];      \
        __shared__ u32 staged_x[GROUP_WORDS * PITCH];                                                               \
        stream<FORMAT>(x, packed, y, in, out, stage, staged_x);                                                     \
    }

STREAM(stream_q4_0, Q4)
STREAM(stream_q8_0, Q8)
