"""Where each setting of a run came from, and the settings that replaced upstream's environment variables.

Upstream: `ferrum_types::runtime_config` and `RuntimeKnobs` (from 0.7.7 on); an extension beside the records of 0.7.0.
Clauses: TY-RUNTIME-1..3 (specs/types.md).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from ferrum_ref.errors import ConfigError
from ferrum_ref.types.record import Record, Usize

TRUE_WORDS = ("1", "true", "yes", "on")
FALSE_WORDS = ("0", "false", "no", "off")


class KvCacheDtype(enum.Enum):
    """Element type of a key/value cache."""

    Fp16 = "Fp16"
    Bf16 = "Bf16"
    Int8 = "Int8"
    Fp8 = "Fp8"


@dataclass(frozen=True, slots=True)
class RuntimeKnobs(Record):
    """Settings of one run; nothing is set at first.  Sizes are in tokens, `spec_n` in draft tokens, `tp` in ranks."""

    kv_capacity: Usize | None = None
    max_model_len: Usize | None = None
    chunked_prefill_size: Usize | None = None
    batch_decode_prof: bool = False
    next_batch_prof: bool = False
    rbd_prof: bool = False
    unified_post_prof: bool = False
    prefix_cache_enabled: bool = False
    model_path: str | None = None
    spec_draft: str | None = None
    spec_n: Usize | None = None
    dtype: str | None = None
    metal_dtype: str | None = None
    tp: Usize | None = None


class RuntimeConfigSource(enum.Enum):
    """Who set a value."""

    Default = "Default"
    ConfigFile = "ConfigFile"
    Cli = "Cli"
    Env = "Env"
    ScriptCase = "ScriptCase"
    MemoryProfile = "MemoryProfile"


class RuntimeConfigEffect(enum.Enum):
    """What a value changes."""

    Correctness = "Correctness"
    Performance = "Performance"
    Memory = "Memory"
    Diagnostics = "Diagnostics"


@dataclass(frozen=True, slots=True)
class RuntimeConfigEntry:
    """One setting as it took effect."""

    key: str
    effective_value: str
    source: RuntimeConfigSource
    affects: list[RuntimeConfigEffect]


@dataclass(frozen=True, slots=True)
class RuntimeConfigSnapshot:
    """The settings of one run, sorted by key, one entry a key.  [TY-RUNTIME-2]"""

    entries: list[RuntimeConfigEntry] = field(default_factory=list)

    @staticmethod
    def capture(environment: Mapping[str, str]) -> RuntimeConfigSnapshot:
        """The `FERRUM_*` variables of `environment` (the caller passes `os.environ`), with no effects named.  Pure."""
        found = (key for key in environment if key.startswith("FERRUM_"))
        snapshot = RuntimeConfigSnapshot()
        for key in found:
            entry = RuntimeConfigEntry(key, environment[key], RuntimeConfigSource.Env, [])
            snapshot = snapshot.upsert(entry)
        return snapshot

    def upsert(self, entry: RuntimeConfigEntry) -> RuntimeConfigSnapshot:
        """A copy in which `entry` replaces the one with its key, or is added.  Pure."""
        others = [known for known in self.entries if known.key != entry.key]
        return RuntimeConfigSnapshot(sorted([*others, entry], key=lambda known: known.key))

    def with_entry(self, entry: RuntimeConfigEntry) -> RuntimeConfigSnapshot:
        """The same as `upsert`.  Pure."""
        return self.upsert(entry)


def parse_bool(key: str, text: str) -> bool:
    """1, true, yes, on; 0, false, no, off; case and space around ignored.  [TY-RUNTIME-3]

    Pure.  Raises ConfigError naming the key for any other text.
    """
    word = text.strip().lower()
    if word not in TRUE_WORDS + FALSE_WORDS:
        words = ", ".join(TRUE_WORDS + FALSE_WORDS)
        raise ConfigError(f"{key}: got {text!r}, expected one of {words}")
    return word in TRUE_WORDS


def parse_tri_state(key: str, text: str | None) -> bool | None:
    """As `parse_bool`; unset or blank is None, the default.  [TY-RUNTIME-3]

    Pure.  Raises ConfigError naming the key for any other text.
    """
    return None if text is None or not text.strip() else parse_bool(key, text)
