// Normalisations over the last axis: one block a row, or a warp a row where rows are short; `packed` says that rows are
// whole packs on 16-byte addresses. A row of at most HELD packs a thread is read once and kept in registers.
// Clauses: BK-CUPY-NORM-1..2, BK-CUPY-40, KN-RMSNORM-*, KN-LAYERNORM-*, KN-SOFTMAX-*.

#define HELD 4
#define MOST_THREADS 1024
#define FOR_ROW(index) for (int index = threadIdx.x; index < n; index += blockDim.x)
#define FOR_PACKS(first) for (int first = threadIdx.x * PACK; first < n; first += blockDim.x * PACK)

// A thread's share of a short row, `count` threads to the row; what lies beyond its end is zero.
struct Share {
    Pack pack[HELD];
};
__device__ __forceinline__ Share load_share(const T* row, int thread, int count, int n) {
    Share share;
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        int first = (thread + k * count) * PACK;
        if (first < n)
            share.pack[k] = load_pack(row + first);
        else
            for (int i = 0; i < WORDS; i++) share.pack[k].word[i] = 0;
    }
    return share;
}
__device__ __forceinline__ float squares_of(const Share& share) {
    float squares = 0.0f, values[PACK];
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        widen_pack(share.pack[k], values);
#pragma unroll
        for (int i = 0; i < PACK; i++) squares += values[i] * values[i];
    }
    return squares;
}
// y = values * scale * weight
__device__ __forceinline__ void store_scaled(const Share& share, const Share& gain, float scale, T* row, int thread, int count, int n) {
    float values[PACK], gains[PACK];
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        int first = (thread + k * count) * PACK;
        if (first >= n) continue;
        widen_pack(share.pack[k], values);
        widen_pack(gain.pack[k], gains);
#pragma unroll
        for (int i = 0; i < PACK; i++) values[i] = values[i] * scale * gains[i];
        store_pack(row + first, narrow_pack(values));
    }
}
// r = a + b, stored; the squares of the sums before they are rounded
__device__ __forceinline__ float add_shares(const Share& a, const Share& b, T* row, int thread, int count, int n) {
    float squares = 0.0f, left[PACK], right[PACK];
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        int first = (thread + k * count) * PACK;
        widen_pack(a.pack[k], left);
        widen_pack(b.pack[k], right);
#pragma unroll
        for (int i = 0; i < PACK; i++) {
            left[i] += right[i];
            squares += left[i] * left[i];
        }
        if (first < n) store_pack(row + first, narrow_pack(left));
    }
    return squares;
}
__device__ __forceinline__ void store_sum_scaled(
    const Share& a, const Share& b, const Share& gain, float scale, T* row, int thread, int count, int n) {
    float left[PACK], right[PACK], gains[PACK];
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        int first = (thread + k * count) * PACK;
        if (first >= n) continue;
        widen_pack(a.pack[k], left);
        widen_pack(b.pack[k], right);
        widen_pack(gain.pack[k], gains);
#pragma unroll
        for (int i = 0; i < PACK; i++) left[i] = (left[i] + right[i]) * scale * gains[i];
        store_pack(row + first, narrow_pack(left));
    }
}

// y = x / sqrt(mean(x^2) + eps) * weight
extern "C" __global__ void __launch_bounds__(MOST_THREADS) rms_norm(
    const T* x, const T* weight, T* y, int n, float eps, int packed) {
    __shared__ float scratch[WARP];
    x += (i64)blockIdx.x * n;
    y += (i64)blockIdx.x * n;
    if (packed && n <= (int)blockDim.x * PACK * HELD) {
        Share row = load_share(x, threadIdx.x, blockDim.x, n), gain = load_share(weight, threadIdx.x, blockDim.x, n);
        float scale = rsqrtf(block_sum(squares_of(row), scratch) / n + eps);
        store_scaled(row, gain, scale, y, threadIdx.x, blockDim.x, n);
        return;
    }
    float squares = 0.0f, values[PACK], gains[PACK];
    if (packed) {
        FOR_PACKS(first) {
            widen_pack(load_pack(x + first), values);
            for (int i = 0; i < PACK; i++) squares += values[i] * values[i];
        }
    } else {
        FOR_ROW(i) squares += widen(x[i]) * widen(x[i]);
    }
    float scale = rsqrtf(block_sum(squares, scratch) / n + eps);
    if (packed) {
        FOR_PACKS(first) {
            widen_pack(load_pack(x + first), values);
            widen_pack(load_pack(weight + first), gains);
            for (int i = 0; i < PACK; i++) values[i] = values[i] * scale * gains[i];
            store_pack(y + first, narrow_pack(values));
        }
    } else {
        FOR_ROW(i) y[i] = narrow(widen(x[i]) * scale * widen(weight[i]));
    }
}

// The same for short packed rows: a warp each
extern "C" __global__ void rms_norm_rows(const T* x, const T* weight, T* y, i64 rows, int n, float eps) {
    int lane = threadIdx.x % WARP;
    i64 row = (i64)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= rows) return;
    Share mine = load_share(x + row * n, lane, WARP, n), gain = load_share(weight, lane, WARP, n);
    float scale = rsqrtf(warp_sum(squares_of(mine)) / n + eps);
    store_scaled(mine, gain, scale, y + row * n, lane, WARP, n);
}

// r = x + residual; y = rms_norm(r, weight), which reads r before it is rounded
extern "C" __global__ void __launch_bounds__(MOST_THREADS) rms_norm_residual(
    const T* x, const T* residual, const T* weight, T* y, T* r, int n, float eps, int packed) {
    __shared__ float scratch[WARP];
    i64 start = (i64)blockIdx.x * n;
    x += start, residual += start, y += start, r += start;
    int thread = threadIdx.x, count = blockDim.x;
    if (packed && n <= count * PACK * HELD) {
        Share a = load_share(x, thread, count, n), b = load_share(residual, thread, count, n);
        float squares = add_shares(a, b, r, thread, count, n);
        Share gain = load_share(weight, thread, count, n);
        store_sum_scaled(a, b, gain, rsqrtf(block_sum(squares, scratch) / n + eps), y, thread, count, n);
        return;
    }
    float squares = 0.0f, left[PACK], right[PACK], gains[PACK];
    if (packed) {
        FOR_PACKS(first) {
            widen_pack(load_pack(x + first), left);
            widen_pack(load_pack(residual + first), right);
            for (int i = 0; i < PACK; i++) {
                left[i] += right[i];
                squares += left[i] * left[i];
            }
            store_pack(r + first, narrow_pack(left));
        }
    } else {
        FOR_ROW(i) {
            float total = widen(x[i]) + widen(residual[i]);
            squares += total * total;
            r[i] = narrow(total);
        }
    }
    float scale = rsqrtf(block_sum(squares, scratch) / n + eps);
    if (packed) {
        FOR_PACKS(first) {
            widen_pack(load_pack(x + first), left);
            widen_pack(load_pack(residual + first), right);
            widen_pack(load_pack(weight + first), gains);
            for (int i = 0; i < PACK; i++) left[i] = (left[i] + right[i]) * scale * gains[i];
            store_pack(y + first, narrow_pack(left));
        }
    } else {
        FOR_ROW(i) y[i] = narrow((widen(x[i]) + widen(residual[i])) * scale * widen(weight[i]));
    }
}

// The same for short packed rows: a warp each
extern "C" __global__ void rms_norm_residual_rows(
    const T* x, const T* residual, const T* weight, T* y, T* r, i64 rows, int n, float eps) {
    int lane = threadIdx.x % WARP;
    i64 row = (i64)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= rows) return;
    Share a = load_share(x + row * n, lane, WARP, n), b = load_share(residual + row * n, lane, WARP, n);
    float squares = add_shares(a, b, r + row * n, lane, WARP, n);
    Share gain = load_share(weight, lane, WARP, n);
    store_sum_scaled(a, b, gain, rsqrtf(warp_sum(squares) / n + eps), y + row * n, lane, WARP, n);
}

// y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias, the mean first; no bias: a null pointer
extern "C" __global__ void __launch_bounds__(MOST_THREADS) layer_norm(
    const T* x, const T* weight, const T* bias, T* y, int n, float eps, int packed) {
    __shared__ float scratch[WARP];
    x += (i64)blockIdx.x * n;
    y += (i64)blockIdx.x * n;
    float sum = 0.0f, squares = 0.0f;
    if (packed && n <= (int)blockDim.x * PACK * HELD) {
        Share row = load_share(x, threadIdx.x, blockDim.x, n);
        float values[PACK], gains[PACK], shifts[PACK];
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            widen_pack(row.pack[k], values);
#pragma unroll
            for (int i = 0; i < PACK; i++) sum += values[i];
        }
        float mean = block_sum(sum, scratch) / n;
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            if ((int)(threadIdx.x + k * blockDim.x) * PACK >= n) continue;
            widen_pack(row.pack[k], values);
#pragma unroll
            for (int i = 0; i < PACK; i++) squares += (values[i] - mean) * (values[i] - mean);
        }
        float scale = rsqrtf(block_sum(squares, scratch) / n + eps);
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            int first = (int)(threadIdx.x + k * blockDim.x) * PACK;
            if (first >= n) continue;
            widen_pack(row.pack[k], values);
            widen_pack(load_pack(weight + first), gains);
#pragma unroll
            for (int i = 0; i < PACK; i++) values[i] = (values[i] - mean) * scale * gains[i];
            if (bias) {
                widen_pack(load_pack(bias + first), shifts);
#pragma unroll
                for (int i = 0; i < PACK; i++) values[i] += shifts[i];
            }
            store_pack(y + first, narrow_pack(values));
        }
        return;
    }
    FOR_ROW(i) sum += widen(x[i]);
    float mean = block_sum(sum, scratch) / n;
    FOR_ROW(i) {
        float off = widen(x[i]) - mean;
        squares += off * off;
    }
    float scale = rsqrtf(block_sum(squares, scratch) / n + eps);
    FOR_ROW(i) {
        float value = (widen(x[i]) - mean) * scale * widen(weight[i]);
        y[i] = narrow(bias ? value + widen(bias[i]) : value);
    }
}

// y = exp(x - max) / sum(exp(x - max)); a row of -inf only, and a NaN, give NaN
extern "C" __global__ void __launch_bounds__(MOST_THREADS) softmax(const T* x, T* y, int n) {
    __shared__ float scratch[WARP];
    x += (i64)blockIdx.x * n;
    y += (i64)blockIdx.x * n;
    float largest = -INFINITE;
    FOR_ROW(i) largest = fmaxf(largest, widen(x[i]));
    largest = block_max(largest, scratch);
    float sum = 0.0f;
    FOR_ROW(i) sum += expf(widen(x[i]) - largest);
    sum = block_sum(sum, scratch);
    FOR_ROW(i) y[i] = narrow(expf(widen(x[i]) - largest) / sum);
}
