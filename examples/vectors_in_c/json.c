#include "json.h"

#include <stdlib.h>
#include <string.h>

enum { DEEPEST = 64 };

struct reader {
    const char *at, *end;
    int depth;
};

static struct json *value(struct reader *r);

static void skip_blanks(struct reader *r) {
    while (r->at < r->end && strchr(" \t\r\n", *r->at) != NULL && *r->at != '\0') r->at++;
}

static int take(struct reader *r, char wanted) {
    skip_blanks(r);
    if (r->at == r->end || *r->at != wanted) return 0;
    r->at++;
    return 1;
}

static struct json *made(enum json_kind kind) {
    struct json *one = calloc(1, sizeof *one);
    if (one != NULL) one->kind = kind;
    return one;
}

static struct json *word(struct reader *r, const char *text, enum json_kind kind) {
    size_t size = strlen(text);
    if ((size_t)(r->end - r->at) < size || memcmp(r->at, text, size) != 0) return NULL;
    r->at += size;
    return made(kind);
}

static struct json *number(struct reader *r) {
    char copy[64], *stop;
    size_t size = 0;
    struct json *one;
    while (r->at + size < r->end && size + 1 < sizeof copy && r->at[size] != '\0' &&
           strchr("+-.0123456789eE", r->at[size]) != NULL)
        size++;
    memcpy(copy, r->at, size);
    copy[size] = '\0';
    if (size == 0 || (one = made(JSON_NUMBER)) == NULL) return NULL;
    one->number = strtod(copy, &stop);
    if (*stop != '\0') return NULL;
    r->at += size;
    return one;
}

/* The four digits of a \u escape as one byte: the files are ASCII, what lies beyond becomes '?'. */
static int escaped_byte(struct reader *r) {
    char digits[5] = {0}, *stop;
    unsigned long code;
    if (r->end - r->at < 4) return -1;
    memcpy(digits, r->at, 4);
    code = strtoul(digits, &stop, 16);
    if (*stop != '\0') return -1;
    r->at += 4;
    return code < 128 ? (int)code : '?';
}

static char *text_at(struct reader *r) {
    char *found, *to;
    if (!take(r, '"') || (found = to = malloc((size_t)(r->end - r->at) + 1)) == NULL) return NULL;
    while (r->at < r->end && *r->at != '"') {
        static const char codes[] = "\"\\/bfnrt", bytes[] = "\"\\/\b\f\n\r\t";
        const char *code;
        int byte = (unsigned char)*r->at++;
        if (byte < 32) return NULL;
        if (byte == '\\') {
            if (r->at == r->end) return NULL;
            byte = *r->at++;
            if (byte == 'u') {
                if ((byte = escaped_byte(r)) < 0) return NULL;
            } else if (byte != '\0' && (code = strchr(codes, byte)) != NULL) {
                byte = bytes[code - codes];
            } else {
                return NULL;
            }
        }
        *to++ = (char)byte;
    }
    *to = '\0';
    found = realloc(found, (size_t)(to - found) + 1);
    return take(r, '"') ? found : NULL;
}

static struct json *members(struct reader *r, enum json_kind kind, char close) {
    struct json *whole = made(kind), **last;
    if (whole == NULL || ++r->depth > DEEPEST) return NULL;
    last = &whole->first;
    if (!take(r, close)) {
        do {
            char *name = NULL;
            if (kind == JSON_OBJECT && ((name = text_at(r)) == NULL || !take(r, ':'))) return NULL;
            if ((*last = value(r)) == NULL) return NULL;
            (*last)->name = name;
            last = &(*last)->next;
        } while (take(r, ','));
        if (!take(r, close)) return NULL;
    }
    r->depth--;
    return whole;
}

static struct json *value(struct reader *r) {
    struct json *one;
    skip_blanks(r);
    if (r->at == r->end) return NULL;
    switch (*r->at) {
    case '{': r->at++; return members(r, JSON_OBJECT, '}');
    case '[': r->at++; return members(r, JSON_LIST, ']');
    case 'n': return word(r, "null", JSON_NULL);
    case 't': return word(r, "true", JSON_TRUE);
    case 'f': return word(r, "false", JSON_FALSE);
    case '"':
        if ((one = made(JSON_TEXT)) == NULL) return NULL;
        one->text = text_at(r);
        return one->text == NULL ? NULL : one;
    default: return number(r);
    }
}

struct json *json_parse(const char *text, size_t size, size_t *fault_at) {
    struct reader r = {text, text + size, 0};
    struct json *whole = value(&r);
    skip_blanks(&r);
    *fault_at = (size_t)(r.at - text);
    return r.at == r.end ? whole : NULL;
}

const struct json *json_get(const struct json *object, const char *name) {
    const struct json *member = object != NULL && object->kind == JSON_OBJECT ? object->first : NULL;
    while (member != NULL && strcmp(member->name, name) != 0) member = member->next;
    return member;
}

size_t json_count(const struct json *value) {
    size_t count = 0;
    const struct json *member;
    for (member = value == NULL ? NULL : value->first; member != NULL; member = member->next) count++;
    return count;
}
