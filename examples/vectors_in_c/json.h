/* A JSON reader as small as golden vectors need it: a tree of values, freed with the process. C99, libc only. */
#ifndef JSON_H
#define JSON_H

#include <stddef.h>

enum json_kind { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_TEXT, JSON_LIST, JSON_OBJECT };

struct json {
    enum json_kind kind;
    double number;
    char *text;        /* of a JSON_TEXT */
    char *name;        /* of a member of an object */
    struct json *first; /* members of a list or an object, in order */
    struct json *next;
};

/* The document in text[0 .. size), or NULL and the byte at which it stops being JSON in *fault_at. */
struct json *json_parse(const char *text, size_t size, size_t *fault_at);

/* The member `name` of an object; NULL where there is none, or `object` is NULL or none. */
const struct json *json_get(const struct json *object, const char *name);

/* Number of members. */
size_t json_count(const struct json *value);

#endif
