#include "safetensors.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void fail(const char *what, const char *which) {
    fprintf(stderr, "vectors: %s: %s\n", which, what);
    exit(2);
}

static void *grown(void *old, size_t size) {
    void *block = realloc(old, size);
    if (block == NULL) fail("not enough memory", "");
    return block;
}

char *read_file(const char *path, size_t *size) {
    char *data = NULL;
    size_t room = 0, got;
    FILE *file = fopen(path, "rb");
    if (file == NULL) fail("cannot be opened", path);
    *size = 0;
    do {
        room = room * 2 + 65536;
        data = grown(data, room + 1);
        got = fread(data + *size, 1, room - *size, file);
        *size += got;
    } while (*size == room);
    if (ferror(file)) fail("cannot be read", path);
    fclose(file);
    data[*size] = '\0';
    return data;
}

struct safetensors safetensors_open(const char *path) {
    struct safetensors file;
    size_t size, fault_at;
    uint64_t header_size;
    char *data = read_file(path, &size);
    if (size < 8) fail("is no safetensors file", path);
    memcpy(&header_size, data, 8);
    if (header_size > size - 8) fail("is truncated: its header reaches beyond its end", path);
    file.size = size;
    file.header = json_parse(data + 8, (size_t)header_size, &fault_at);
    if (file.header == NULL) fail("has a header that is no JSON", path);
    file.data = data + 8 + header_size;
    file.num_bytes = size - 8 - (size_t)header_size;
    return file;
}

static size_t element_bytes(const char *dtype) {
    if (strcmp(dtype, "F64") == 0 || strcmp(dtype, "I64") == 0) return 8;
    if (strcmp(dtype, "F32") == 0) return 4;
    if (strcmp(dtype, "F16") == 0 || strcmp(dtype, "BF16") == 0) return 2;
    return strcmp(dtype, "U8") == 0 ? 1 : 0;
}

struct tensor safetensors_get(const struct safetensors *file, const char *name) {
    struct tensor found = {{0}, {0}, 0, 1, 0, NULL};
    const struct json *row = json_get(file->header, name), *size;
    const struct json *dtype = json_get(row, "dtype"), *shape = json_get(row, "shape");
    const struct json *offsets = json_get(row, "data_offsets");
    size_t begin, end;
    if (row == NULL) fail("the file has no tensor of this name", name);
    if (dtype == NULL || dtype->kind != JSON_TEXT || strlen(dtype->text) >= sizeof found.dtype ||
        json_count(shape) > MOST_AXES || json_count(offsets) != 2)
        fail("its row in the header is broken", name);
    strcpy(found.dtype, dtype->text);
    for (size = shape == NULL ? NULL : shape->first; size != NULL; size = size->next) {
        found.shape[found.num_axes++] = (size_t)size->number;
        found.num_elements *= (size_t)size->number;
    }
    begin = (size_t)offsets->first->number;
    end = (size_t)offsets->first->next->number;
    found.num_bytes = found.num_elements * element_bytes(found.dtype);
    if (begin > end || end > file->num_bytes || end - begin != found.num_bytes) fail("it lies outside its file", name);
    found.data = file->data + begin;
    return found;
}

void safetensors_add_f32(struct safetensors_writer *out, const char *name, const float *values, const struct tensor *like) {
    size_t axis, num_bytes = like->num_elements * sizeof *values;
    char *to;
    out->header = grown(out->header, out->header_size + strlen(name) + 32 * (MOST_AXES + 4));
    to = out->header + out->header_size;
    to += sprintf(to, "%s\"%s\":{\"dtype\":\"F32\",\"shape\":[", out->header_size ? "," : "{", name);
    for (axis = 0; axis < like->num_axes; axis++)
        to += sprintf(to, "%s%lu", axis ? "," : "", (unsigned long)like->shape[axis]);
    to += sprintf(to, "],\"data_offsets\":[%lu,%lu]}", (unsigned long)out->data_size,
                  (unsigned long)(out->data_size + num_bytes));
    out->header_size = (size_t)(to - out->header);
    out->data = grown(out->data, out->data_size + num_bytes + 1);
    if (num_bytes != 0) memcpy(out->data + out->data_size, values, num_bytes);
    out->data_size += num_bytes;
}

void safetensors_save(struct safetensors_writer *out, const char *path) {
    FILE *file = fopen(path, "wb");
    uint64_t size;
    int failed;
    if (file == NULL) fail("cannot be written", path);
    out->header = grown(out->header, out->header_size + 16);
    if (out->header_size == 0) out->header[out->header_size++] = '{';
    out->header[out->header_size++] = '}';
    while (out->header_size % 8 != 0) out->header[out->header_size++] = ' ';
    size = out->header_size;
    fwrite(&size, 8, 1, file);
    fwrite(out->header, 1, out->header_size, file);
    if (out->data_size != 0) fwrite(out->data, 1, out->data_size, file);
    failed = ferror(file);
    if (fclose(file) != 0 || failed) fail("cannot be written", path);
}
