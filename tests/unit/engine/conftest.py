"""Small parts for engine tests: a byte tokenizer, and an executor whose next token is a hash of what the cache holds.

The executor writes each token into the slots that the block table names and reads the whole history back from there: a
wrong block table, a stale block or a lost token changes the text that follows.
"""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from ferrum_ref.engine.llm import LlmEngine
from ferrum_ref.interfaces.model_executor import UnifiedBatch
from ferrum_ref.interfaces.tokenizer import IncrementalTokenizer, TokenizerInfo, TokenizerType
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.serving import assemble_engine
from ferrum_ref.types.config import EngineConfig
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import ModelId, TokenId
from ferrum_ref.types.models import ModelInfo, ModelType
from ferrum_ref.types.requests import InferenceRequest
from ferrum_ref.types.sampling import SamplingParams, SpecialTokens

EOS = 256
VOCABULARY = 257


class ByteTokenizer(IncrementalTokenizer[list[Any]]):
    """One token per UTF-8 byte, and an end token."""

    def encode(self, text: str, add_special: bool) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int], skip_special: bool) -> str:
        return bytes(t for t in tokens if t != EOS).decode(errors="replace")

    def decode_incremental(self, prev: Sequence[int], next: int) -> str:
        raise AssertionError("the engine keeps a state")

    def vocab_size(self) -> int:
        return VOCABULARY

    def special_tokens(self) -> SpecialTokens:
        return SpecialTokens(eos_token=TokenId(EOS))

    def token_id(self, text: str) -> int | None:
        return None

    def token_text(self, token_id: int) -> str | None:
        return None

    def info(self) -> TokenizerInfo:
        return TokenizerInfo(TokenizerType.Custom, VOCABULARY, self.special_tokens(), True, False, 1, None)

    def create_state(self) -> list[Any]:
        return [codecs.getincrementaldecoder("utf-8")("replace"), ""]

    def decode_incremental_with_state(self, state: list[Any], token: int) -> str:
        return self._add(state, state[0].decode(bytes([token])))

    def flush(self, state: list[Any]) -> str:
        return self._add(state, state[0].decode(b"", True))

    def reset_state(self, state: list[Any]) -> None:
        state[:] = self.create_state()

    def get_decoded_text(self, state: list[Any]) -> str:
        return str(state[1])

    def _add(self, state: list[Any], piece: str) -> str:
        state[1] += piece
        return piece


def next_by_hash(history: bytes) -> int:
    """A lower-case letter, or now and then the end."""
    digest = hashlib.blake2b(history, digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    return EOS if number % 40 == 0 else 97 + number % 26


@dataclass
class HashExecutor:
    """Writes ids where K/V would go, reads them back through the block table, and points at one next token."""

    num_blocks: int
    block_size: int
    next_token: Callable[[bytes], int] = next_by_hash
    before: Callable[[UnifiedBatch], None] = lambda batch: None
    slots: np.ndarray = field(init=False)
    gate: threading.Event = field(default_factory=threading.Event)
    num_steps: int = 0
    is_held: bool = False

    def __post_init__(self) -> None:
        self.slots = np.full(self.num_blocks * self.block_size, -1, dtype=np.int64)
        self.gate.set()

    def execute_unified(self, batch: UnifiedBatch) -> list[np.ndarray | None]:
        self.is_held = not self.gate.is_set()
        assert self.gate.wait(10)
        self.is_held = False
        self.before(batch)
        self.num_steps += 1
        return [self._one(item) for item in batch.items]

    def _one(self, item: Any) -> np.ndarray | None:
        blocks = np.array(item.kv_cache.block_table().physical_blocks)
        length = item.pos_offset + len(item.q_tokens)
        positions = np.arange(length)
        where = blocks[positions // self.block_size] * self.block_size + positions % self.block_size
        self.slots[where[item.pos_offset :]] = item.q_tokens
        if not item.is_final_chunk:
            return None
        history = self.slots[where]
        assert (history >= 0).all()
        logits = np.zeros(VOCABULARY, dtype=np.float32)
        logits[self.next_token(history.astype("<u2").tobytes())] = 10.0
        return logits


MODEL = ModelInfo(
    ModelId("bytes"), ModelType.Custom("bytes"), 0, 1, 1, 1, 1, VOCABULARY, 4096, DataType.FP32, Device.CPU,
    None, None, {},
)  # fmt: skip


class Setup:
    """An engine, its cache manager and its executor."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        *,
        config: EngineConfig | None = None,
        max_num_batched_tokens: int = 32,
        max_num_seqs: int = 8,
        clock: Callable[[], float] | None = None,
        prefix_caching: bool = True,
        **executor: Any,
    ) -> None:
        self.kv_cache = PagedKvCacheManager(num_blocks, block_size, enable_prefix_caching=prefix_caching)
        self.executor = HashExecutor(num_blocks, block_size, **executor)
        self.engine: LlmEngine = assemble_engine(
            executor=self.executor,
            kv_cache=self.kv_cache,
            tokenizer=ByteTokenizer(),
            model_info=MODEL,
            stop_token_ids=[EOS],
            config=config,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            clock=clock,
        )

    async def until_held(self) -> None:
        """Wait until a step is in flight and held up by the executor's gate."""
        while not self.executor.is_held:
            await asyncio.sleep(0.001)

    async def require_clean(self) -> None:
        """Every block free, every reference count zero, the books balanced."""
        await self.engine.drain()
        self.engine.loop.check_invariants()
        stats = self.kv_cache.stats()
        assert stats.free_blocks == stats.total_blocks
        assert stats.active_caches == 0
        assert all(count == 0 for count in self.kv_cache.pool.ref_counts)


def make_request(prompt: str, **params: Any) -> InferenceRequest:
    defaults = {"temperature": 0.0, "max_tokens": 20}
    return InferenceRequest.new(prompt, "bytes").with_sampling_params(SamplingParams(**{**defaults, **params}))


def expected_text(prompt: str, max_tokens: int, next_token: Callable[[bytes], int] = next_by_hash) -> str:
    """What the hash model says, by plain recursion without an engine."""
    history = list(prompt.encode())
    start = len(history)
    while len(history) < start + max_tokens:
        token = next_token(np.array(history, dtype="<u2").tobytes())
        if token == EOS:
            break
        history.append(token)
    return bytes(history[start:]).decode()


class Tools:
    """What the tests take from here (a fixture, since test folders are no packages)."""

    EOS = EOS
    Setup = Setup
    tokenizer = ByteTokenizer
    request = staticmethod(make_request)
    expected_text = staticmethod(expected_text)
    next_by_hash = staticmethod(next_by_hash)

    @staticmethod
    def run(main: Coroutine[Any, Any, Any]) -> Any:
        async def limited() -> Any:
            return await asyncio.wait_for(main, 60)

        return asyncio.run(limited())


@pytest.fixture(scope="session")
def tools() -> type[Tools]:
    return Tools
