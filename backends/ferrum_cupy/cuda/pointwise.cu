// Activations, arithmetic and rotary positions: a thread a pack where addresses and sizes allow (`packed`), else an element.
// Clauses: BK-CUPY-POINT-1..2, BK-CUPY-40..41, KN-SILU-*, KN-GELU-*, KN-ROPE-*.

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
            float values[PACK];                                                                \
            widen_pack(load_pack(x + at * PACK), values);                                      \
            for (int i = 0; i < PACK; i++) {                                                   \
                float value = values[i];                                                       \
                values[i] = VALUE;                                                             \
            }                                                                                  \
            store_pack(y + at * PACK, narrow_pack(values));                                    \
        } else if (at < count) {                                                               \
            float value = widen(x[at]);                                                        \
            y[at] = narrow(VALUE);                                                             \
        }                                                                                      \
    }

POINTWISE(silu, silu_of(value))
POINTWISE(gelu, gelu_of(value))
POINTWISE(gelu_tanh, gelu_tanh_of(value))
POINTWISE(relu, value < 0.0f ? 0.0f : value)

#define PAIRWISE(NAME, VALUE)                                                                     \
    extern "C" __global__ void NAME(const T* x, const T* other, T* y, i64 count, int packed) {    \
        i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;                                      \
        if (packed) {                                                                             \
            if (at * PACK >= count) return;                                                       \
            float left[PACK], right[PACK];                                                        \
            Pack first = load_pack(x + at * PACK), second = load_pack(other + at * PACK);         \
            widen_pack(first, left);                                                              \
            widen_pack(second, right);                                                            \
            for (int i = 0; i < PACK; i++) {                                                      \
                float a = left[i], b = right[i];                                                  \
                left[i] = VALUE;                                                                  \
            }                                                                                     \
            store_pack(y + at * PACK, narrow_pack(left));                                         \
        } else if (at < count) {                                                                  \
            float a = widen(x[at]), b = widen(other[at]);                                         \
            y[at] = narrow(VALUE);                                                                \
        }                                                                                         \
    }

PAIRWISE(silu_mul, silu_of(a) * b)
PAIRWISE(add_each, a + b)
PAIRWISE(sub_each, a - b)
PAIRWISE(mul_each, a * b)
PAIRWISE(div_each, a / b)

// One thread's pair, or pack of pairs. Index arithmetic in 32 bits where the elements can be counted in them.
template <typename Index>
__device__ __forceinline__ void rotate(
    Index at, const T* x, const T* cos, const T* sin, const i64* positions, T* y, int tokens, int heads, int half, int packed) {
    Index steps = packed ? half / PACK : half, head = at / steps, row = head / heads;
    int i = (int)(at - head * steps) * (packed ? PACK : 1);
    i64 angle = positions[row % (Index)tokens] * half + i, first = (i64)head * 2 * half + i, second = first + half;
    if (packed) {
        Pack a = load_pack(x + first), b = load_pack(x + second), c = load_pack(cos + angle), s = load_pack(sin + angle);
        float left[PACK], right[PACK], cosines[PACK], sines[PACK];
        widen_pack(a, left);
        widen_pack(b, right);
        widen_pack(c, cosines);
        widen_pack(s, sines);
#pragma unroll
        for (int j = 0; j < PACK; j++) {
            float turned = right[j] * cosines[j] + left[j] * sines[j];
            left[j] = left[j] * cosines[j] - right[j] * sines[j];
            right[j] = turned;
        }
        store_pack(y + first, narrow_pack(left));
        store_pack(y + second, narrow_pack(right));
    } else {
        float x1 = widen(x[first]), x2 = widen(x[second]), cosine = widen(cos[angle]), sine = widen(sin[angle]);
        y[first] = narrow(x1 * cosine - x2 * sine);
        y[second] = narrow(x2 * cosine + x1 * sine);
    }
}

// Pair (i, i + half) of every head by the angle of its token's position: x (rows, heads, 2 half), row r at positions[r % tokens]
extern "C" __global__ void rotary(
    const T* x, const T* cos, const T* sin, const i64* positions, T* y, i64 rows, int tokens, int heads, int half, int packed) {
    i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x, count = rows * heads * (packed ? half / PACK : half);
    if (at >= count) return;
    if (count <= 0x7fffffff)
        rotate<u32>((u32)at, x, cos, sin, positions, y, tokens, heads, half, packed);
    else
        rotate<i64>(at, x, cos, sin, positions, y, tokens, heads, half, packed);
}

// The same by float32 tables, a thread a pair
extern "C" __global__ void rotary_wide(
    const T* x, const float* cos, const float* sin, const i64* positions, T* y, i64 rows, int tokens, int heads, int half) {
    i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= rows * heads * half) return;
    i64 head = at / half, i = at % half, angle = positions[head / heads % tokens] * half + i, first = head * 2 * half + i;
    float x1 = widen(x[first]), x2 = widen(x[first + half]), cosine = cos[angle], sine = sin[angle];
    y[first] = narrow(x1 * cosine - x2 * sine);
    y[first + half] = narrow(x2 * cosine + x1 * sine);
}
