// The parts of a decode step that take the token and its position from device memory, so that a recorded graph can be replayed.
// Clauses: BK-CUPY-17..19.

// y = table[*id]; one block
extern "C" __global__ void take_row(const T* table, const i64* id, T* y, int n) {
    const T* row = table + *id * (i64)n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = row[i];
}

// cache[*position] = row, and *length = *position + 1; one block
extern "C" __global__ void store_row(const T* row, T* cache, const i64* position, i64* length, int n) {
    T* to = cache + *position * (i64)n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) to[i] = row[i];
    if (threadIdx.x == 0) *length = *position + 1;
}

// y = float32 sums, rounded, with a bias where there is one (null: none)
extern "C" __global__ void round_sums(const float* sums, const T* bias, T* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    T rounded = narrow(sums[i]);
    y[i] = bias ? narrow(widen(rounded) + widen(bias[i])) : rounded;
}
