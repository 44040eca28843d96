// The parts of a decode step that take the token and its position from device memory, so that a recorded graph can be replayed.
// Clauses: BK-CUPY-17..19.

// y = table[*id]; one block
extern "C" __global__ void take_row(const T* table, const i64* id, T* y, int n) {
    const T* row = table + *id * (i64)n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = row[i];
}

// k_cache[*position] = k, v_cache[*position] = v, and *length = *position + 1; a block each
extern "C" __global__ void store_rows(
    const T* k, const T* v, T* k_cache, T* v_cache, const i64* position, i64* length, int n) {
    const T* row = blockIdx.x ? v : k;
    T* to = (blockIdx.x ? v_cache : k_cache) + *position * (i64)n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) to[i] = row[i];
    if (blockIdx.x == 0 && threadIdx.x == 0) *length = *position + 1;
}

__device__ __forceinline__ T rounded_sum(const float* sums, const T* bias, int i) {
    T rounded = narrow(sums[i]);
    return bias ? narrow(widen(rounded) + widen(bias[i])) : rounded;
}

// y = float32 sums, rounded, with a bias where there is one (null: none)
extern "C" __global__ void round_sums(const float* sums, const T* bias, T* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    y[i] = rounded_sum(sums, bias, i);
}

// y = silu(gate) * up, of the n gates and then the n ups that round_sums would give
extern "C" __global__ void silu_sums(const float* sums, const T* bias, T* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    y[i] = narrow(silu_of(widen(rounded_sum(sums, bias, i))) * widen(rounded_sum(sums, bias, n + i)));
}
