"""The one error tree of the project: every failure a caller can meet is a kind of `FerrumError`.

    FerrumError
    ├── ConfigError             bad settings
    ├── ModelError              a model's contents or files contradict themselves
    ├── TokenizerError          text <-> ids
    ├── BackendError            shapes and kernels
    │   └── ShapeError          an array argument has the wrong shape
    ├── DeviceError             device or dtype conversion
    ├── SchedulerError          unknown request, full queue
    ├── RequestValidationError  a request's parameters
    ├── ResourceExhaustedError  capacity
    ├── FerrumTimeoutError      took too long
    ├── AuthError
    ├── RateLimitError
    ├── FerrumIOError           operating system
    ├── SerializationError      JSON
    ├── NetworkError            download
    ├── InternalError           an invariant of this project broke
    ├── CancelledError          the caller gave up
    ├── NotFoundError           unknown name or handle
    ├── AlreadyExistsError      duplicate name or handle
    ├── PermissionDeniedError
    ├── UnsupportedError        not offered here
    ├── InvalidFormatError      a file is not what it claims
    └── InvalidParameterError   a value outside its domain

Upstream: `ferrum_types::FerrumError`, 22 kinds, one text field each.  Clauses: TY-ERROR-1..6 (specs/types.md).
"""

from __future__ import annotations

import json
from typing import ClassVar


class FerrumError(Exception):
    """Base of all errors; `str(error)` is "<prefix>: <message>".  [TY-ERROR-1]"""

    kind: ClassVar[str] = "Internal"
    prefix: ClassVar[str] = "Internal error"
    retryable: ClassVar[bool] = False
    client: ClassVar[bool] = False
    server: ClassVar[bool] = False
    status: ClassVar[int] = 500

    # Each kind under upstream's name: `except FerrumError.NotFound`.  [TY-ERROR-6]
    Config: ClassVar[type[ConfigError]]
    Model: ClassVar[type[ModelError]]
    Tokenizer: ClassVar[type[TokenizerError]]
    Backend: ClassVar[type[BackendError]]
    Device: ClassVar[type[DeviceError]]
    Scheduler: ClassVar[type[SchedulerError]]
    RequestValidation: ClassVar[type[RequestValidationError]]
    ResourceExhausted: ClassVar[type[ResourceExhaustedError]]
    Timeout: ClassVar[type[FerrumTimeoutError]]
    Auth: ClassVar[type[AuthError]]
    RateLimit: ClassVar[type[RateLimitError]]
    IO: ClassVar[type[FerrumIOError]]
    Serialization: ClassVar[type[SerializationError]]
    Network: ClassVar[type[NetworkError]]
    Internal: ClassVar[type[InternalError]]
    Cancelled: ClassVar[type[CancelledError]]
    NotFound: ClassVar[type[NotFoundError]]
    AlreadyExists: ClassVar[type[AlreadyExistsError]]
    PermissionDenied: ClassVar[type[PermissionDeniedError]]
    Unsupported: ClassVar[type[UnsupportedError]]
    InvalidFormat: ClassVar[type[InvalidFormatError]]
    InvalidParameter: ClassVar[type[InvalidParameterError]]

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return f"{self.prefix}: {self.message}"

    def is_retryable(self) -> bool:
        """True when the same call may succeed later.  [TY-ERROR-2]"""
        return self.retryable

    def is_client_error(self) -> bool:
        """True when the caller must change the request.  [TY-ERROR-2]"""
        return self.client

    def is_server_error(self) -> bool:
        """True when the fault lies with the engine.  [TY-ERROR-2]"""
        return self.server

    def http_status(self) -> int:
        """HTTP status for this kind.  [TY-ERROR-3; D-46]"""
        return self.status

    @staticmethod
    def from_value(error: Exception) -> FerrumError:
        """JSON errors become SerializationError, OS errors FerrumIOError, the rest InternalError.  [TY-ERROR-4]"""
        if isinstance(error, FerrumError):
            return error
        if isinstance(error, json.JSONDecodeError):
            return SerializationError(str(error))
        if isinstance(error, OSError):
            return FerrumIOError(str(error))
        return InternalError(f"{type(error).__name__}: {error}")

    # Upstream's constructors, by upstream's names.  [TY-ERROR-5]
    @staticmethod
    def config(message: str) -> ConfigError:
        return ConfigError(message)

    @staticmethod
    def model(message: str) -> ModelError:
        return ModelError(message)

    @staticmethod
    def tokenizer(message: str) -> TokenizerError:
        return TokenizerError(message)

    @staticmethod
    def backend(message: str) -> BackendError:
        return BackendError(message)

    @staticmethod
    def device(message: str) -> DeviceError:
        return DeviceError(message)

    @staticmethod
    def scheduler(message: str) -> SchedulerError:
        return SchedulerError(message)

    @staticmethod
    def request_validation(message: str) -> RequestValidationError:
        return RequestValidationError(message)

    @staticmethod
    def resource_exhausted(message: str) -> ResourceExhaustedError:
        return ResourceExhaustedError(message)

    @staticmethod
    def timeout(message: str) -> FerrumTimeoutError:
        return FerrumTimeoutError(message)

    @staticmethod
    def auth(message: str) -> AuthError:
        return AuthError(message)

    @staticmethod
    def rate_limit(message: str) -> RateLimitError:
        return RateLimitError(message)

    @staticmethod
    def io(message: str) -> FerrumIOError:
        return FerrumIOError(message)

    @staticmethod
    def serialization(message: str) -> SerializationError:
        return SerializationError(message)

    @staticmethod
    def network(message: str) -> NetworkError:
        return NetworkError(message)

    @staticmethod
    def internal(message: str) -> InternalError:
        return InternalError(message)

    @staticmethod
    def cancelled(message: str) -> CancelledError:
        return CancelledError(message)

    @staticmethod
    def not_found(message: str) -> NotFoundError:
        return NotFoundError(message)

    @staticmethod
    def already_exists(message: str) -> AlreadyExistsError:
        return AlreadyExistsError(message)

    @staticmethod
    def permission_denied(message: str) -> PermissionDeniedError:
        return PermissionDeniedError(message)

    @staticmethod
    def unsupported(message: str) -> UnsupportedError:
        return UnsupportedError(message)

    @staticmethod
    def invalid_format(message: str) -> InvalidFormatError:
        return InvalidFormatError(message)

    @staticmethod
    def invalid_parameter(message: str) -> InvalidParameterError:
        return InvalidParameterError(message)

    io_str = io
    configuration = config
    deserialization = serialization
    invalid_request = request_validation


class ConfigError(FerrumError):
    kind, prefix = "Config", "Configuration error"


class ModelError(FerrumError):
    kind, prefix, server = "Model", "Model error", True


class TokenizerError(FerrumError):
    kind, prefix = "Tokenizer", "Tokenizer error"


class BackendError(FerrumError):
    kind, prefix, server = "Backend", "Backend error", True


class ShapeError(BackendError):
    """An array argument of a kernel has the wrong shape; a Backend error to callers."""


class DeviceError(FerrumError):
    kind, prefix, server = "Device", "Device error", True


class SchedulerError(FerrumError):
    kind, prefix, server = "Scheduler", "Scheduler error", True


class RequestValidationError(FerrumError):
    kind, prefix, client, status = "RequestValidation", "Request validation error", True, 400


class ResourceExhaustedError(FerrumError):
    kind, prefix, retryable, server, status = "ResourceExhausted", "Resource exhausted", True, True, 503


class FerrumTimeoutError(FerrumError):
    kind, prefix, retryable, server, status = "Timeout", "Operation timed out", True, True, 504


class AuthError(FerrumError):
    kind, prefix, client, status = "Auth", "Authentication error", True, 401


class RateLimitError(FerrumError):
    kind, prefix, client, status = "RateLimit", "Rate limit exceeded", True, 429


class FerrumIOError(FerrumError):
    kind, prefix = "IO", "I/O error"


class SerializationError(FerrumError):
    """JSON that cannot be read or written; `path` says where, like `$.models[3].device`, when that is known."""

    kind, prefix = "Serialization", "Serialization error"

    def __init__(self, message: str, *, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path


class NetworkError(FerrumError):
    kind, prefix, retryable = "Network", "Network error", True


class InternalError(FerrumError):
    kind, prefix, server = "Internal", "Internal error", True


class CancelledError(FerrumError):
    kind, prefix, status = "Cancelled", "Request cancelled", 499


class NotFoundError(FerrumError):
    kind, prefix, client, status = "NotFound", "Not found", True, 404


class AlreadyExistsError(FerrumError):
    kind, prefix, client, status = "AlreadyExists", "Already exists", True, 409


class PermissionDeniedError(FerrumError):
    kind, prefix, client, status = "PermissionDenied", "Permission denied", True, 403


class UnsupportedError(FerrumError):
    kind, prefix, client, status = "Unsupported", "Unsupported operation", True, 501


class InvalidFormatError(FerrumError):
    kind, prefix, status = "InvalidFormat", "Invalid format", 400


class InvalidParameterError(FerrumError):
    kind, prefix, status = "InvalidParameter", "Invalid parameter", 400


FerrumError.Config = ConfigError
FerrumError.Model = ModelError
FerrumError.Tokenizer = TokenizerError
FerrumError.Backend = BackendError
FerrumError.Device = DeviceError
FerrumError.Scheduler = SchedulerError
FerrumError.RequestValidation = RequestValidationError
FerrumError.ResourceExhausted = ResourceExhaustedError
FerrumError.Timeout = FerrumTimeoutError
FerrumError.Auth = AuthError
FerrumError.RateLimit = RateLimitError
FerrumError.IO = FerrumIOError
FerrumError.Serialization = SerializationError
FerrumError.Network = NetworkError
FerrumError.Internal = InternalError
FerrumError.Cancelled = CancelledError
FerrumError.NotFound = NotFoundError
FerrumError.AlreadyExists = AlreadyExistsError
FerrumError.PermissionDenied = PermissionDeniedError
FerrumError.Unsupported = UnsupportedError
FerrumError.InvalidFormat = InvalidFormatError
FerrumError.InvalidParameter = InvalidParameterError
