"""Where a model is; `ferrum_ref.types.models` re-exports these names.

Upstream: `ferrum_types::models::ModelSource`.  Clause: TY-MODEL-6 (specs/types.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar


class ModelSource:
    """Where a model is: one of `ModelSource.Local`, `.HuggingFace`, `.Url`, `.S3`."""

    __slots__ = ()
    Local: ClassVar[type[LocalSource]]
    HuggingFace: ClassVar[type[HuggingFaceSource]]
    Url: ClassVar[type[UrlSource]]
    S3: ClassVar[type[S3Source]]


@dataclass(frozen=True, slots=True)
class LocalSource(ModelSource):
    """A path on this machine."""

    path: str


@dataclass(frozen=True, slots=True)
class HuggingFaceSource(ModelSource):
    """A repository of the Hugging Face hub."""

    repo_id: str
    revision: str | None
    cache_dir: str | None


@dataclass(frozen=True, slots=True)
class UrlSource(ModelSource):
    """An address, with the request headers it needs; `repr` shows neither, for both may hold a secret."""

    url: str = field(repr=False)
    headers: dict[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class S3Source(ModelSource):
    """An object in an S3 bucket."""

    bucket: str
    key: str
    region: str | None
    endpoint: str | None = field(repr=False)


ModelSource.Local = LocalSource
ModelSource.HuggingFace = HuggingFaceSource
ModelSource.Url = UrlSource
ModelSource.S3 = S3Source
