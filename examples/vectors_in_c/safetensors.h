/* safetensors files: u64 n, n bytes of JSON {name: {dtype, shape, data_offsets}}, data. Little-endian machines only. */
#ifndef SAFETENSORS_H
#define SAFETENSORS_H

#include <stddef.h>

#include "json.h"

enum { MOST_AXES = 8 };

struct tensor {
    char dtype[8];
    size_t shape[MOST_AXES], num_axes;
    size_t num_elements, num_bytes;
    const void *data; /* may lie at any address: copy before use */
};

struct safetensors {
    const struct json *header;
    const char *data;
    size_t num_bytes; /* of the data */
    size_t size;      /* of the whole file */
};

/* A whole file in memory, with a 0 behind it; says on stderr what is wrong and ends the program otherwise. */
char *read_file(const char *path, size_t *size);

/* Likewise for a safetensors file. */
struct safetensors safetensors_open(const char *path);

/* The tensor `name`; ends the program if there is none, or if it lies outside the file. */
struct tensor safetensors_get(const struct safetensors *file, const char *name);

/* A file that grows: begin, any number of F32 tensors, end. */
struct safetensors_writer {
    char *header, *data;
    size_t header_size, data_size;
};
void safetensors_add_f32(struct safetensors_writer *out, const char *name, const float *values, const struct tensor *like);
void safetensors_save(struct safetensors_writer *out, const char *path);

void fail(const char *what, const char *which);

#endif
