#include "kernels.h"

#include <math.h>

void rms_norm(const float *x, const float *weight, float eps, size_t num_rows, size_t width, float *y) {
    size_t row, i;
    for (row = 0; row < num_rows; row++, x += width, y += width) {
        float sum = 0.0f, scale;
        for (i = 0; i < width; i++) sum += x[i] * x[i];
#ifdef WRONG_EPS /* a bug that happens: eps outside the root */
        scale = 1.0f / (sqrtf(sum / (float)width) + eps);
#else
        scale = 1.0f / sqrtf(sum / (float)width + eps);
#endif
        for (i = 0; i < width; i++) y[i] = x[i] * scale * weight[i];
    }
}

static float silu(float x) {
    if (x < -80.0f) return isinf(x) ? -0.0f : x * expf(x); /* exp(-x) would overflow, and the result would be 0 */
    return x / (1.0f + expf(-x));
}

void silu_mul(const float *gate, const float *up, size_t count, float *y) {
    size_t i;
    for (i = 0; i < count; i++) y[i] = silu(gate[i]) * up[i];
}
