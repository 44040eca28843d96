// Attention over contiguous or paged keys and values, with an online softmax in float32.
//
// HEAD_DIM is the head size. Keys of sequence b lie in rows [0, keys(b)) of `k` and `v`, each row (G, HEAD_DIM); row p is
//   contiguous (table null):  b * stride + p            paged:  table[b * max_blocks + p / block_size] * block_size + p % block_size
// Query t of `tokens` sits at position keys(b) - tokens + t; causal: it sees keys up to its own, of a window the last ones.
// A query that sees no key gives zeros. `sinks` (H), if any, is one more logit a head that attends to nothing.
// Clauses: BK-CUPY-ATTN-1..3, KN-ATTN-*, KN-PAGED-*.

struct Keys {
    const T *k, *v;
    const i64* table;   // null: contiguous
    const i64* lengths; // valid keys of each sequence
    i64 stride;
    int max_blocks, block_size, kv_heads;
};

__device__ __forceinline__ i64 row_of(const Keys& keys, int sequence, int position) {
    if (!keys.table) return sequence * keys.stride + position;
    i64 block = keys.table[(i64)sequence * keys.max_blocks + position / keys.block_size];
    return block * keys.block_size + position % keys.block_size;
}

__device__ __forceinline__ float capped(float score, float cap) { return cap > 0.0f ? cap * tanhf(score / cap) : score; }

// ---- many queries: a warp a query, WARPS queries of one head a block, TILE keys at a time in shared memory -------------
#define WARPS 8
#define TILE 32
#define SLICE ((HEAD_DIM + WARP - 1) / WARP)

extern "C" __global__ void attend_many(
    const T* q, const T* k, const T* v, const i64* table, const i64* lengths, const T* sinks, T* out, int tokens, int heads,
    int kv_heads, i64 stride, int max_blocks, int block_size, float scale, float cap, int causal, int window) {
    __shared__ float tile[TILE][HEAD_DIM + 1];
    __shared__ float queries[WARPS][HEAD_DIM];
    Keys keys = {k, v, table, lengths, stride, max_blocks, block_size, kv_heads};
    int sequence = blockIdx.z, head = blockIdx.y, kv_head = head / (heads / kv_heads);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, token = blockIdx.x * WARPS + warp;
    int num_keys = (int)lengths[sequence], position = num_keys - tokens + token;
    int is_real = token < tokens;
    int last = causal ? position : num_keys - 1, first = causal && window > 0 ? position - window + 1 : 0;
    if (is_real)
        for (int d = lane; d < HEAD_DIM; d += WARP)
            queries[warp][d] = widen(q[(((i64)sequence * tokens + token) * heads + head) * HEAD_DIM + d]);
    int newest = blockIdx.x * WARPS + WARPS - 1 < tokens ? blockIdx.x * WARPS + WARPS - 1 : tokens - 1;
    int stop = causal ? num_keys - tokens + newest + 1 : num_keys;
    int start = causal && window > 0 ? num_keys - tokens + (int)blockIdx.x * WARPS - window + 1 : 0;
    start = start < 0 ? 0 : start / TILE * TILE;
    float largest = -INFINITE, total = 0.0f, mixed[SLICE];
    for (int i = 0; i < SLICE; i++) mixed[i] = 0.0f;
    for (int base = start; base < stop; base += TILE) {
        int count = stop - base < TILE ? stop - base : TILE;
        __syncthreads();
        for (int at = threadIdx.x; at < count * HEAD_DIM; at += blockDim.x) {
            i64 row = row_of(keys, sequence, base + at / HEAD_DIM);
            tile[at / HEAD_DIM][at % HEAD_DIM] = widen(k[(row * kv_heads + kv_head) * HEAD_DIM + at % HEAD_DIM]);
        }
        __syncthreads();
        int key = base + lane, seen = is_real && lane < count && key <= last && key >= first;
        float score = -INFINITE;
        if (seen) {
            float dot = 0.0f;
            for (int d = 0; d < HEAD_DIM; d++) dot += queries[warp][d] * tile[lane][d];
            score = capped(dot * scale, cap);
        }
        __syncthreads();
        for (int at = threadIdx.x; at < count * HEAD_DIM; at += blockDim.x) {
            i64 row = row_of(keys, sequence, base + at / HEAD_DIM);
            tile[at / HEAD_DIM][at % HEAD_DIM] = widen(v[(row * kv_heads + kv_head) * HEAD_DIM + at % HEAD_DIM]);
        }
        __syncthreads();
        float next = fmaxf(largest, warp_max(score));
        float share = seen && score != -INFINITE ? expf(score - next) : 0.0f;  // a NaN stays one
        float fade = largest > -INFINITE ? expf(largest - next) : 0.0f;
        total = total * fade + warp_sum(share);
        largest = next;
        for (int i = 0; i < SLICE; i++) mixed[i] *= fade;
        for (int j = 0; j < count; j++) {
            float weight = __shfl_sync(FULL, share, j);
            if (weight != 0.0f)  // what nobody sees may be NaN
                for (int i = 0; i < SLICE; i++)
                    if (lane + i * WARP < HEAD_DIM) mixed[i] += weight * tile[j][lane + i * WARP];
        }
    }
    if (!is_real) return;
    if (sinks && largest > -INFINITE) {
        float sink = widen(sinks[head]), next = fmaxf(largest, sink), fade = expf(largest - next);
        total = total * fade + expf(sink - next);
        for (int i = 0; i < SLICE; i++) mixed[i] *= fade;
    }
    T* to = out + (((i64)sequence * tokens + token) * heads + head) * HEAD_DIM;
    for (int i = 0; i < SLICE; i++)
        if (lane + i * WARP < HEAD_DIM) to[lane + i * WARP] = narrow(total == 0.0f ? 0.0f : mixed[i] / total);
}

// ---- one query a sequence: keys split over blocks; LANES lanes share a key, SHARED heads share its reading ------------
#define LANES 8
#define PART ((HEAD_DIM + LANES - 1) / LANES)
#define IS_PACKED (HEAD_DIM % (LANES * PACK) == 0)
#define PACKS (IS_PACKED ? PART / PACK : 1)
#ifndef SHARED
#define SHARED 4
#endif
#define DECODE_WARPS 4
#define AT_ONCE (DECODE_WARPS * WARP / LANES)
#define DECODE_BLOCKS (PART > 16 || (PART > 8 && STORAGE == 0) ? 2 : 3)  // a multiprocessor, by the registers that they take

// Keeps the compiler from holding what lies in shared memory in registers over a whole loop.
#ifdef FERRUM_HOST
#define FORGET_SHARED()
#else
#define FORGET_SHARED() asm volatile("" ::: "memory")
#endif

// A lane's part of a key or a value, as it lies in memory where it is whole packs.
struct Part {
#if IS_PACKED
    Pack pack[PACKS];
#else
    float value[PART];
#endif
};
__device__ __forceinline__ void load_part(const T* row, int lane, Part& part) {
#if IS_PACKED
#pragma unroll
    for (int i = 0; i < PACKS; i++) part.pack[i] = load_once(row + lane * PART + i * PACK);
#else
#pragma unroll
    for (int i = 0; i < PART; i++) part.value[i] = lane * PART + i < HEAD_DIM ? widen(row[lane * PART + i]) : 0.0f;
#endif
}
__device__ __forceinline__ void widen_part(const Part& part, float* values) {
#if IS_PACKED
#pragma unroll
    for (int i = 0; i < PACKS; i++) widen_pack(part.pack[i], values + i * PACK);
#else
#pragma unroll
    for (int i = 0; i < PART; i++) values[i] = part.value[i];
#endif
}

// A lane's share of a query, out of shared memory: read anew for each key, since registers hold the mixtures.
struct __align__(16) Four {
    float at[4];
};
#if IS_PACKED
#define QUERY_WORDS (PART / 4)
typedef Four QueryWord;
#else
#define QUERY_WORDS PART
typedef float QueryWord;
#endif
__device__ __forceinline__ float query_dot(const QueryWord (*query)[LANES], int lane, const float* values) {
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < QUERY_WORDS; i++) {
        QueryWord word = query[i][lane];
#if IS_PACKED
#pragma unroll
        for (int j = 0; j < 4; j++) dot += word.at[j] * values[4 * i + j];
#else
        dot += word * values[i];
#endif
    }
    return dot;
}

// partial (B, H, splits, HEAD_DIM) unnormalised mixtures; marks (B, H, splits, 2): their maximum and their sum
extern "C" __global__ void __launch_bounds__(DECODE_WARPS* WARP, DECODE_BLOCKS) attend_one(
    const T* q, const T* k, const T* v, const i64* table, const i64* lengths, float* partial, float* marks, int heads,
    int kv_heads, i64 stride, int max_blocks, int block_size, int splits, float scale, float cap, int window) {
    __shared__ float rows[DECODE_WARPS * SHARED][HEAD_DIM];
    __shared__ QueryWord query[SHARED][QUERY_WORDS][LANES];
    __shared__ float tops[DECODE_WARPS * SHARED], sums[DECODE_WARPS * SHARED];
    Keys keys = {k, v, table, lengths, stride, max_blocks, block_size, kv_heads};
    int ratio = heads / kv_heads, groups = (ratio + SHARED - 1) / SHARED;
    int sequence = blockIdx.z, kv_head = blockIdx.y / groups, base = (blockIdx.y % groups) * SHARED, split = blockIdx.x;
    int here = ratio - base < SHARED ? ratio - base : SHARED;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % LANES, place = (threadIdx.x % WARP) / LANES;
    int num_keys = (int)lengths[sequence], first = window > 0 && num_keys > window ? num_keys - window : 0;
    int each = (num_keys - first + splits - 1) / splits, start = first + split * each;
    int stop = start + each < num_keys ? start + each : num_keys;
    float mixed[SHARED][PART], largest[SHARED], total[SHARED], values[PART];
#pragma unroll
    for (int h = 0; h < SHARED; h++) {
        largest[h] = -INFINITE, total[h] = 0.0f;
#pragma unroll
        for (int i = 0; i < PART; i++) mixed[h][i] = 0.0f;
    }
    const T* queries = q + ((i64)sequence * heads + kv_head * ratio + base) * HEAD_DIM;
    for (int at = threadIdx.x; at < SHARED * PART * LANES; at += blockDim.x) {
        int h = at / (PART * LANES), d = at % (PART * LANES), i = d % PART;
        float element = h < here && d < HEAD_DIM ? widen(queries[h * HEAD_DIM + d]) : 0.0f;
#if IS_PACKED
        query[h][i / 4][d / PART].at[i % 4] = element;
#else
        query[h][i][d / PART] = element;
#endif
    }
    int key = start + warp * (WARP / LANES) + place;
    Part next_key, next_value;
    i64 next_row = 0;
    if (key < stop) {
        i64 row = (row_of(keys, sequence, key) * kv_heads + kv_head) * HEAD_DIM;
        load_part(k + row, lane, next_key);
        load_part(v + row, lane, next_value);
    }
    if (key + AT_ONCE < stop) next_row = row_of(keys, sequence, key + AT_ONCE);
    __syncthreads();
    for (; key - place < stop; key += AT_ONCE) {
        FORGET_SHARED();
        Part this_key = next_key, this_value = next_value;
        if (key + AT_ONCE < stop) {  // under way while these are multiplied
            i64 row = (next_row * kv_heads + kv_head) * HEAD_DIM;
            load_part(k + row, lane, next_key);
            load_part(v + row, lane, next_value);
            if (key + 2 * AT_ONCE < stop) next_row = row_of(keys, sequence, key + 2 * AT_ONCE);
        }
        int seen = key < stop;
        float score[SHARED];
        if (seen) widen_part(this_key, values);
#pragma unroll
        for (int h = 0; h < SHARED; h++) {
            float dot = seen ? query_dot(query[h], lane, values) : 0.0f;
#pragma unroll
            for (int step = LANES / 2; step > 0; step /= 2) dot += __shfl_xor_sync(FULL, dot, step);
            score[h] = dot * scale;
        }
        if (!seen) continue;
        widen_part(this_value, values);
#pragma unroll
        for (int h = 0; h < SHARED; h++) {
            if (h >= here) break;
            float value = cap > 0.0f ? capped(score[h], cap) : score[h];
            if (!(value <= largest[h])) {  // a new maximum, or NaN: the rest is scaled down to it
                float next = fmaxf(largest[h], value), fade = largest[h] > -INFINITE ? expf(largest[h] - next) : 0.0f;
                total[h] *= fade;
                largest[h] = next;
#pragma unroll
                for (int i = 0; i < PART; i++) mixed[h][i] *= fade;
            }
            float share = value == -INFINITE ? 0.0f : expf(value - largest[h]);  // a NaN stays one
            total[h] += share;
#pragma unroll
            for (int i = 0; i < PART; i++) mixed[h][i] += share * values[i];
        }
    }
#pragma unroll
    for (int h = 0; h < SHARED; h++) {  // over the keys of a warp
        float top = largest[h];
#pragma unroll
        for (int step = LANES; step < WARP; step *= 2) top = fmaxf(top, __shfl_xor_sync(FULL, top, step));
        float fade = largest[h] > -INFINITE ? expf(largest[h] - top) : 0.0f, sum = total[h] * fade;
#pragma unroll
        for (int step = LANES; step < WARP; step *= 2) sum += __shfl_xor_sync(FULL, sum, step);
#pragma unroll
        for (int i = 0; i < PART; i++) {
            float value = mixed[h][i] * fade;
#pragma unroll
            for (int step = LANES; step < WARP; step *= 2) value += __shfl_xor_sync(FULL, value, step);
            if (place == 0 && lane * PART + i < HEAD_DIM) rows[warp * SHARED + h][lane * PART + i] = value;
        }
        if (threadIdx.x % WARP == 0) {
            tops[warp * SHARED + h] = sum == sum ? top : fmaxf(top, 0.0f);  // a sum that is NaN is never left out
            sums[warp * SHARED + h] = sum;
        }
    }
    __syncthreads();
    for (int h = 0; h < here; h++) {  // over the warps of a block
        float top = -INFINITE, sum = 0.0f, fades[DECODE_WARPS];
        for (int w = 0; w < DECODE_WARPS; w++) top = fmaxf(top, tops[w * SHARED + h]);
#pragma unroll
        for (int w = 0; w < DECODE_WARPS; w++) {
            fades[w] = tops[w * SHARED + h] > -INFINITE ? expf(tops[w * SHARED + h] - top) : 0.0f;
            if (fades[w] != 0.0f) sum += sums[w * SHARED + h] * fades[w];
        }
        i64 cell = ((i64)sequence * heads + kv_head * ratio + base + h) * splits + split;
        for (int d = threadIdx.x; d < HEAD_DIM; d += blockDim.x) {
            float value = 0.0f;
#pragma unroll
            for (int w = 0; w < DECODE_WARPS; w++)
                if (fades[w] != 0.0f) value += rows[w * SHARED + h][d] * fades[w];
            partial[cell * HEAD_DIM + d] = value;
        }
        if (threadIdx.x == 0) marks[cell * 2] = top, marks[cell * 2 + 1] = sum;
    }
}

// out (B, H, HEAD_DIM) from the splits; a block a head
extern "C" __global__ void merge_splits(const float* partial, const float* marks, const T* sinks, T* out, int heads, int splits) {
    i64 cell = (i64)blockIdx.x * splits;
    float top = -INFINITE, total = 0.0f;
    for (int s = 0; s < splits; s++) top = fmaxf(top, marks[(cell + s) * 2]);
    int seen = top > -INFINITE;
    float sink = sinks && seen ? widen(sinks[blockIdx.x % heads]) : -INFINITE;
    top = fmaxf(top, sink);
    for (int s = 0; s < splits; s++)
        if (marks[(cell + s) * 2] > -INFINITE) total += marks[(cell + s) * 2 + 1] * expf(marks[(cell + s) * 2] - top);
    if (sink > -INFINITE) total += expf(sink - top);
    for (int d = threadIdx.x; d < HEAD_DIM; d += blockDim.x) {
        float value = 0.0f;
        for (int s = 0; s < splits; s++)
            if (marks[(cell + s) * 2] > -INFINITE)
                value += partial[(cell + s) * HEAD_DIM + d] * expf(marks[(cell + s) * 2] - top);
        out[(i64)blockIdx.x * HEAD_DIM + d] = narrow(seen ? value / total : 0.0f);
    }
}
