"""The error tree against the contract's table."""

from __future__ import annotations

import inspect
import json
import pickle
import typing

import pytest

from ferrum_ref import errors
from ferrum_ref.errors import FerrumError, ShapeError
from ferrum_ref.types.errors import Result

# kind: (constructor, prefix, retryable, client, server, status), transcribed from the contract
TABLE = {
    "Config": ("config", "Configuration error", 0, 0, 0, 500),
    "Model": ("model", "Model error", 0, 0, 1, 500),
    "Tokenizer": ("tokenizer", "Tokenizer error", 0, 0, 0, 500),
    "Backend": ("backend", "Backend error", 0, 0, 1, 500),
    "Device": ("device", "Device error", 0, 0, 1, 500),
    "Scheduler": ("scheduler", "Scheduler error", 0, 0, 1, 500),
    "RequestValidation": ("request_validation", "Request validation error", 0, 1, 0, 400),
    "ResourceExhausted": ("resource_exhausted", "Resource exhausted", 1, 0, 1, 503),
    "Timeout": ("timeout", "Operation timed out", 1, 0, 1, 504),
    "Auth": ("auth", "Authentication error", 0, 1, 0, 401),
    "RateLimit": ("rate_limit", "Rate limit exceeded", 0, 1, 0, 429),
    "IO": ("io", "I/O error", 0, 0, 0, 500),
    "Serialization": ("serialization", "Serialization error", 0, 0, 0, 500),
    "Network": ("network", "Network error", 1, 0, 0, 500),
    "Internal": ("internal", "Internal error", 0, 0, 1, 500),
    "Cancelled": ("cancelled", "Request cancelled", 0, 0, 0, 499),
    "NotFound": ("not_found", "Not found", 0, 1, 0, 404),
    "AlreadyExists": ("already_exists", "Already exists", 0, 1, 0, 409),
    "PermissionDenied": ("permission_denied", "Permission denied", 0, 1, 0, 403),
    "Unsupported": ("unsupported", "Unsupported operation", 0, 1, 0, 501),
    "InvalidFormat": ("invalid_format", "Invalid format", 0, 0, 0, 400),
    "InvalidParameter": ("invalid_parameter", "Invalid parameter", 0, 0, 0, 400),
}


@pytest.mark.clause("TY-ERROR-1", "TY-ERROR-2", "TY-ERROR-3", "TY-ERROR-5")
@pytest.mark.parametrize("kind", TABLE)
def test_each_kind_is_as_the_table_says(kind: str) -> None:
    constructor, prefix, retryable, client, server, status = TABLE[kind]
    error = getattr(FerrumError, constructor)("what happened")
    assert isinstance(error, FerrumError)
    assert error.kind == kind
    assert error.message == "what happened"
    assert str(error) == f"{prefix}: what happened"
    assert (error.is_retryable(), error.is_client_error(), error.is_server_error()) == (retryable, client, server)
    assert error.http_status() == status


@pytest.mark.clause("TY-ERROR-1")
def test_the_tree_has_exactly_the_kinds_of_the_table() -> None:
    leaves = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, FerrumError)]
    direct = [c for c in leaves if FerrumError in c.__bases__]
    assert sorted(c.kind for c in direct) == sorted(TABLE)
    assert ShapeError("x").kind == "Backend"
    assert str(ShapeError("x")) == "Backend error: x"


@pytest.mark.clause("TY-ERROR-2")
def test_no_kind_is_both_client_and_server_error() -> None:
    assert not [k for k, row in TABLE.items() if row[3] and row[4]]
    for constructor, *_ in TABLE.values():
        error = getattr(FerrumError, constructor)("x")
        assert not (error.is_client_error() and error.is_server_error())


@pytest.mark.clause("TY-ERROR-4")
def test_foreign_errors_are_taken_over() -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("{")
    assert FerrumError.from_value(caught.value).kind == "Serialization"
    assert FerrumError.from_value(FileNotFoundError(2, "gone")).kind == "IO"
    internal = FerrumError.from_value(ZeroDivisionError("oops"))
    assert internal.kind == "Internal"
    assert "ZeroDivisionError" in internal.message
    own = FerrumError.model("m")
    assert FerrumError.from_value(own) is own


@pytest.mark.clause("TY-ERROR-5")
@pytest.mark.parametrize(
    ("alias", "kind"),
    [
        ("io_str", "IO"),
        ("configuration", "Config"),
        ("deserialization", "Serialization"),
        ("invalid_request", "RequestValidation"),
    ],
)
def test_aliases_of_constructors(alias: str, kind: str) -> None:
    assert getattr(FerrumError, alias)("x").kind == kind


@pytest.mark.clause("TY-ERROR-6")
@pytest.mark.parametrize("kind", TABLE)
def test_each_kind_stands_under_upstreams_name(kind: str) -> None:
    cls = getattr(FerrumError, kind)
    assert cls.kind == kind
    assert type(getattr(FerrumError, TABLE[kind][0])("x")) is cls
    with pytest.raises(cls):
        raise cls("x")


@pytest.mark.clause("TY-ERROR-6")
def test_errors_live_where_upstream_has_them() -> None:
    from ferrum_ref.types import errors as upstreams

    assert upstreams.FerrumError is FerrumError
    hints = typing.get_type_hints(answer, include_extras=True)
    assert hints["return"] == typing.Annotated[int, FerrumError]
    assert typing.get_type_hints(answer)["return"] is int


def answer() -> Result[int]:
    return 42


@pytest.mark.clause("TY-ERROR-6")
def test_a_serialization_error_knows_its_place() -> None:
    error = errors.SerializationError("m", path="$.a[0]")
    assert (error.path, str(error)) == ("$.a[0]", "Serialization error: m")
    again = pickle.loads(pickle.dumps(error))
    assert (again.path, again.message) == (error.path, error.message)
    assert FerrumError.serialization("m").path is None
