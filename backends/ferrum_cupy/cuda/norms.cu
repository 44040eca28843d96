// Normalisations over the last axis: one block a row; `packed` says that rows are whole packs on 16-byte addresses.
// Clauses: BK-CUPY-NORM-1..2, KN-RMSNORM-*, KN-LAYERNORM-*, KN-SOFTMAX-*.

#define FOR_ROW(index) for (int index = threadIdx.x; index < n; index += blockDim.x)
#define FOR_PACKS(first) for (int first = threadIdx.x * PACK; first < n; first += blockDim.x * PACK)

// y = x / sqrt(mean(x^2) + eps) * weight
extern "C" __global__ void rms_norm(const T* x, const T* weight, T* y, int n, float eps, int packed) {
    __shared__ float scratch[WARP];
    x += (i64)blockIdx.x * n;
    y += (i64)blockIdx.x * n;
    float squares = 0.0f;
    if (packed) {
        FOR_PACKS(first) {
            Pack in = load_pack(x + first);
            for (int i = 0; i < PACK; i++) squares += widen(in.at[i]) * widen(in.at[i]);
        }
    } else {
        FOR_ROW(i) squares += widen(x[i]) * widen(x[i]);
    }
    float scale = rsqrtf(block_sum(squares, scratch) / n + eps);
    if (packed) {
        FOR_PACKS(first) {
            Pack in = load_pack(x + first), gain = load_pack(weight + first), out;
            for (int i = 0; i < PACK; i++) out.at[i] = narrow(widen(in.at[i]) * scale * widen(gain.at[i]));
            store_pack(y + first, out);
        }
    } else {
        FOR_ROW(i) y[i] = narrow(widen(x[i]) * scale * widen(weight[i]));
    }
}

// r = x + residual; y = rms_norm(r, weight), which reads r before it is rounded
extern "C" __global__ void rms_norm_residual(
    const T* x, const T* residual, const T* weight, T* y, T* r, int n, float eps, int packed) {
    __shared__ float scratch[WARP];
    i64 start = (i64)blockIdx.x * n;
    x += start, residual += start, y += start, r += start;
    float squares = 0.0f;
    if (packed) {
        FOR_PACKS(first) {
            Pack a = load_pack(x + first), b = load_pack(residual + first), sum;
            for (int i = 0; i < PACK; i++) {
                float total = widen(a.at[i]) + widen(b.at[i]);
                squares += total * total;
                sum.at[i] = narrow(total);
            }
            store_pack(r + first, sum);
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
            Pack a = load_pack(x + first), b = load_pack(residual + first), gain = load_pack(weight + first), out;
            for (int i = 0; i < PACK; i++)
                out.at[i] = narrow((widen(a.at[i]) + widen(b.at[i])) * scale * widen(gain.at[i]));
            store_pack(y + first, out);
        }
    } else {
        FOR_ROW(i) y[i] = narrow((widen(x[i]) + widen(residual[i])) * scale * widen(weight[i]));
    }
}

// y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias, the mean first; no bias: a null pointer
extern "C" __global__ void layer_norm(const T* x, const T* weight, const T* bias, T* y, int n, float eps) {
    __shared__ float scratch[WARP];
    x += (i64)blockIdx.x * n;
    y += (i64)blockIdx.x * n;
    float sum = 0.0f;
    FOR_ROW(i) sum += widen(x[i]);
    float mean = block_sum(sum, scratch) / n;
    float squares = 0.0f;
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
extern "C" __global__ void softmax(const T* x, T* y, int n) {
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
