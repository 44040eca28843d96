/* Runs two float32 kernels on the golden vectors of a folder, judges every element, and writes what came out:

       vectors SET OUTPUTS.safetensors

   Exit status 0: every vector passes, 1: one does not, 2: a file cannot be read. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "json.h"
#include "kernels.h"
#include "safetensors.h"

enum { LONGEST_NAME = 256, LONGEST_PATH = 4096 };

static const char *text_of(const struct json *object, const char *name) {
    const struct json *member = json_get(object, name);
    if (member == NULL || member->kind != JSON_TEXT) fail("is no text in the manifest", name);
    return member->text;
}

static struct tensor part_of(const struct safetensors *file, const char *vector, const char *part) {
    char name[LONGEST_NAME];
    snprintf(name, sizeof name, "%s/%s", vector, part);
    return safetensors_get(file, name);
}

/* A copy, because data in a file may lie at any address. */
static void *copy_of(const struct tensor *tensor, const char *dtype) {
    void *copy = malloc(tensor->num_bytes + 1);
    if (copy == NULL) fail("not enough memory", "");
    if (strcmp(tensor->dtype, dtype) != 0) fail("is the element type of a tensor that should have another", tensor->dtype);
    memcpy(copy, tensor->data, tensor->num_bytes);
    return copy;
}

/* The file of an operation's vectors, of the size that the manifest gives. */
static struct safetensors opened(const char *set, const struct json *operation) {
    char path[LONGEST_PATH];
    const struct json *num_bytes = json_get(operation, "num_bytes");
    struct safetensors file;
    snprintf(path, sizeof path, "%s/%s", set, text_of(operation, "file"));
    file = safetensors_open(path);
    if (num_bytes == NULL || num_bytes->number != (double)file.size) fail("has another size than the manifest gives", path);
    return file;
}

static float *run(const struct safetensors *file, const struct json *vector, const char *name, const char *operation) {
    int norm = strcmp(operation, "rms_norm") == 0;
    struct tensor first = part_of(file, name, norm ? "in/x" : "in/gate");
    struct tensor second = part_of(file, name, norm ? "in/weight" : "in/up");
    float *a = copy_of(&first, "F32"), *b = copy_of(&second, "F32"), *y = malloc(first.num_bytes + 1);
    if (y == NULL) fail("not enough memory", name);
    if (norm) {
        const struct json *eps = json_get(json_get(vector, "parameters"), "eps");
        size_t width = second.num_elements;
        if (eps == NULL || width == 0) fail("has no eps, or no width", name);
        rms_norm(a, b, (float)eps->number, first.num_elements / width, width, y);
    } else {
        silu_mul(a, b, first.num_elements, y);
    }
    free(a);
    free(b);
    return y;
}

/* |got - value| <= bound; NaN where the value is NaN, and the same infinity. */
static int is_right(double got, double value, double bound) {
    if (isnan(value)) return isnan(got);
    if (isinf(value)) return got == value;
    return fabs(got - value) <= bound;
}

static int judge(const struct safetensors *file, const char *name, const float *y) {
    struct tensor value = part_of(file, name, "value/y"), bound = part_of(file, name, "bound/y");
    double *values = copy_of(&value, "F64"), *bounds = copy_of(&bound, "F64"), largest = 0.0;
    size_t i, wrong = 0;
    for (i = 0; i < value.num_elements; i++) {
        if (!is_right(y[i], values[i], bounds[i])) {
            if (wrong++ == 0)
                printf("fail  %-16s element %lu: got %.9g, expected %.9g, bound %.3g\n", name, (unsigned long)i, y[i],
                       values[i], bounds[i]);
        } else if (isfinite(values[i]) && bounds[i] > 0.0) {
            largest = fmax(largest, fabs(y[i] - values[i]) / bounds[i]);
        }
    }
    if (wrong == 0) printf("pass  %-16s err/bound %.3g\n", name, largest);
    free(values);
    free(bounds);
    return wrong == 0;
}

int main(int argc, char **argv) {
    char path[LONGEST_PATH], tensor_name[LONGEST_NAME];
    struct safetensors_writer out = {NULL, NULL, 0, 0};
    const struct json *manifest, *format, *version, *vectors, *vector;
    size_t size, fault_at, num_judged = 0, num_passed = 0;
    char *text;
    if (argc != 3) fail("expected SET OUTPUTS.safetensors", "usage");
    snprintf(path, sizeof path, "%s/manifest.json", argv[1]);
    text = read_file(path, &size);
    manifest = json_parse(text, size, &fault_at);
    format = json_get(manifest, "format");
    version = json_get(manifest, "version");
    vectors = json_get(manifest, "vectors");
    if (format == NULL || format->kind != JSON_TEXT || strcmp(format->text, "ferrum-golden-vectors") != 0 || vectors == NULL)
        fail("is no manifest of golden vectors", path);
    if (version == NULL || version->number != 1.0) fail("has a version other than 1", path);
    for (vector = vectors->first; vector != NULL; vector = vector->next) {
        const char *name = text_of(vector, "name"), *operation = text_of(vector, "operation");
        struct safetensors file;
        struct tensor value;
        float *y;
        if (strcmp(text_of(vector, "storage"), "fp32") != 0) continue;
        if (strcmp(operation, "rms_norm") != 0 && strcmp(operation, "silu_mul") != 0) continue;
        file = opened(argv[1], json_get(json_get(manifest, "operations"), operation));
        value = part_of(&file, name, "value/y");
        y = run(&file, vector, name, operation);
        snprintf(tensor_name, sizeof tensor_name, "%s/y", name);
        safetensors_add_f32(&out, tensor_name, y, &value);
        num_passed += (size_t)judge(&file, name, y);
        num_judged++;
        free(y);
    }
    safetensors_save(&out, argv[2]);
    printf("%lu of %lu vectors pass\n", (unsigned long)num_passed, (unsigned long)num_judged);
    return num_passed == num_judged && num_judged > 0 ? 0 : 1;
}
