"""JSON as upstream writes and reads it (serde): every record of the contracts, strictly, with the path in each error.

    to_json(value)              a record, id, enum value, error or plain JSON value -> text
    from_json(kind, text)       text -> a value of `kind`
    to_jsonable, from_jsonable  the same between values and Python's own dicts, lists, numbers and texts
    JsonCodec                   the four as methods, with options

The rules are those of `ferrum_types` and `ferrum_interfaces`; no record names its own form, all follow from the
dataclass annotations.  Clauses: TY-JSON-1..20 (specs/json.md).
"""

from ferrum_ref.serialization.codec import JsonCodec, from_json, from_jsonable, to_json, to_jsonable

__all__ = ["JsonCodec", "from_json", "from_jsonable", "to_json", "to_jsonable"]
