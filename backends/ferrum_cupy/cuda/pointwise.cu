// Activations and rotary positions: a thread a pack where addresses and sizes allow (`packed`), else a thread an element.
// Clauses: BK-CUPY-POINT-1..2, KN-SILU-*, KN-GELU-*, KN-ROPE-*.

// x sigmoid(x) in a form whose exponential neither overflows nor is subnormal; -0 at -inf
__device__ __forceinline__ float silu_of(float x) {
    if (x == -INFINITE) return -0.0f;
    float root = expf(fminf(x, 0.0f) * 0.5f);
    return x * root * root / (1.0f + expf(-fabsf(x)));
}

// gelu in float64: x Phi(x) cancels in the negative tail otherwise; -0 at -inf
__device__ __forceinline__ float gelu_of(float x) {
    if (x == -INFINITE) return -0.0f;
    return (float)(0.5 * (double)x * erfc(-(double)x * 0.70710678118654752440));
}
__device__ __forceinline__ float gelu_tanh_of(float x) {
    if (x == -INFINITE) return -0.0f;
    double wide = x;
    return (float)(wide / (1.0 + exp(-1.59576912160573071176 * (wide + 0.044715 * wide * wide * wide))));
}

#define POINTWISE(NAME, VALUE)                                                                 \
    extern "C" __global__ void NAME(const T* x, T* y, i64 count, int packed) {                 \
        i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;                                   \
        if (packed) {                                                                          \
            if (at * PACK >= count) return;                                                    \
            Pack in = load_pack(x + at * PACK), out;                                           \
            for (int i = 0; i < PACK; i++) {                                                   \
                float value = widen(in.at[i]);                                                 \
                out.at[i] = narrow(VALUE);                                                     \
            }                                                                                  \
            store_pack(y + at * PACK, out);                                                    \
        } else if (at < count) {                                                               \
            float value = widen(x[at]);                                                        \
            y[at] = narrow(VALUE);                                                             \
        }                                                                                      \
    }

POINTWISE(silu, silu_of(value))
POINTWISE(gelu, gelu_of(value))
POINTWISE(gelu_tanh, gelu_tanh_of(value))

// y = gate * sigmoid(gate) * up
extern "C" __global__ void silu_mul(const T* gate, const T* up, T* y, i64 count, int packed) {
    i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (packed) {
        if (at * PACK >= count) return;
        Pack g = load_pack(gate + at * PACK), u = load_pack(up + at * PACK), out;
        for (int i = 0; i < PACK; i++) out.at[i] = narrow(silu_of(widen(g.at[i])) * widen(u.at[i]));
        store_pack(y + at * PACK, out);
    } else if (at < count) {
        y[at] = narrow(silu_of(widen(gate[at])) * widen(up[at]));
    }
}

// Pair (i, i + half) of every head by the angle of its token's position: x (rows, heads, 2 half), row r at positions[r % tokens]
extern "C" __global__ void rotary(
    const T* x, const T* cos, const T* sin, const i64* positions, T* y, i64 rows, int tokens, int heads, int half, int packed) {
    int width = packed ? PACK : 1, steps = half / width;
    i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= rows * heads * steps) return;
    int i = (int)(at % steps) * width;
    i64 head = at / steps, row = head / heads;
    i64 angle = positions[row % tokens] * half + i, first = head * 2 * half + i, second = first + half;
    if (packed) {
        Pack a = load_pack(x + first), b = load_pack(x + second), c = load_pack(cos + angle), s = load_pack(sin + angle);
        Pack left, right;
        for (int j = 0; j < PACK; j++) {
            float x1 = widen(a.at[j]), x2 = widen(b.at[j]), cosine = widen(c.at[j]), sine = widen(s.at[j]);
            left.at[j] = narrow(x1 * cosine - x2 * sine);
            right.at[j] = narrow(x2 * cosine + x1 * sine);
        }
        store_pack(y + first, left);
        store_pack(y + second, right);
    } else {
        float x1 = widen(x[first]), x2 = widen(x[second]), cosine = widen(cos[angle]), sine = widen(sin[angle]);
        y[first] = narrow(x1 * cosine - x2 * sine);
        y[second] = narrow(x2 * cosine + x1 * sine);
    }
}
