"""Wiring of a text engine: scheduler, KV-cache manager, step loop and executor around a loaded model.

Clauses: EN-BUILD-1..3 (specs/engine.md), LM-LOAD-6 (specs/llm.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from ferrum_ref import __version__
from ferrum_ref.assembly import BLOCK_SIZE_TOKENS, LoadedModel, plan_kv_blocks
from ferrum_ref.engine.admission import Entrance
from ferrum_ref.engine.llm import LlmEngine
from ferrum_ref.engine.report import EngineReport
from ferrum_ref.engine.step_loop import StepLoop
from ferrum_ref.executor.llm_executor import LlmExecutor
from ferrum_ref.interfaces.llm import DecoderOnlyLLM
from ferrum_ref.interfaces.model_executor import UnifiedExecutor
from ferrum_ref.interfaces.sampler import Order
from ferrum_ref.interfaces.scheduler import BatchHint, ResourceConstraints
from ferrum_ref.interfaces.tokenizer import IncrementalTokenizer
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.sampling import RequestSampler
from ferrum_ref.scheduler.continuous_batch import ContinuousBatchScheduler
from ferrum_ref.types.config import EngineConfig
from ferrum_ref.types.models import ModelInfo

DEFAULT_KV_MEMORY_BYTES = 2**30


def build_engine(
    loaded: LoadedModel,
    *,
    max_num_batched_tokens: int = 512,
    max_num_seqs: int = 32,
    num_blocks: int | None = None,
    block_size: int = BLOCK_SIZE_TOKENS,
    kv_memory_bytes: int = DEFAULT_KV_MEMORY_BYTES,
    enable_prefix_caching: bool = True,
    config: EngineConfig | None = None,
    sampling_order: Order = "temperature_last",
    clock: Callable[[], float] | None = None,
) -> LlmEngine:
    """A text engine around a loaded model.  [EN-BUILD-2..3]

    max_num_batched_tokens: tokens of one step, prompts and decodes together; max_num_seqs: requests running at once.
    num_blocks: blocks of the KV cache; without it as many as kv_memory_bytes hold and max_num_seqs requests can use.
    Raises InvalidParameterError, ResourceExhaustedError (no block fits), UnsupportedError (scheduling policy).
    """
    if num_blocks is None:
        num_blocks = plan_kv_blocks(
            loaded.kv_shape,
            kv_memory_bytes,
            block_size,
            max_tokens=loaded.info.max_sequence_length,
            max_num_seqs=max_num_seqs,
        )
    executor, kv_cache = loaded.new_executor(
        num_blocks, block_size, enable_prefix_caching=enable_prefix_caching, max_batch_size=max_num_seqs
    )
    return assemble_engine(
        executor=executor,
        kv_cache=kv_cache,
        tokenizer=loaded.tokenizer,
        model_info=loaded.info,
        stop_token_ids=loaded.stop_token_ids,
        config=config,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        sampling_order=sampling_order,
        clock=clock,
    )


def build_llm_engine(
    loaded: LoadedModel,
    llm: DecoderOnlyLLM,
    *,
    num_blocks: int,
    max_num_batched_tokens: int = 512,
    max_num_seqs: int = 32,
    block_size: int = BLOCK_SIZE_TOKENS,
) -> LlmEngine:
    """A text engine around an LLM of `loaded` that keeps its own caches, such as `new_stepped_llm`.  [LM-LOAD-6]

    The blocks bound the tokens that run at once and hold none; prefixes are not shared. `llm` is the engine's from now.
    Raises InvalidParameterError unless num_blocks and block_size are >= 1.
    """
    return assemble_engine(
        executor=LlmExecutor(llm),
        kv_cache=PagedKvCacheManager(num_blocks, block_size, enable_prefix_caching=False),
        tokenizer=loaded.tokenizer,
        model_info=loaded.info,
        stop_token_ids=loaded.stop_token_ids,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
    )


def epoch_clock() -> Callable[[], float]:
    """Seconds since 1970 that never go back: the wall clock now, plus what the monotonic clock says since."""
    offset_s = time.time() - time.monotonic()
    return lambda: offset_s + time.monotonic()


def assemble_engine(
    *,
    executor: UnifiedExecutor,
    kv_cache: PagedKvCacheManager,
    tokenizer: IncrementalTokenizer[Any],
    model_info: ModelInfo,
    stop_token_ids: Iterable[int],
    config: EngineConfig | None = None,
    max_num_batched_tokens: int = 512,
    max_num_seqs: int = 32,
    sampling_order: Order = "temperature_last",
    clock: Callable[[], float] | None = None,
) -> LlmEngine:
    """An engine over parts that exist already.  [EN-BUILD-1]

    The limits are those of `build_engine`. Raises UnsupportedError for a scheduling policy that is not implemented.
    """
    config = config or EngineConfig()
    scheduler = ContinuousBatchScheduler(config.scheduler)
    hint = BatchHint(max_num_seqs, max_num_batched_tokens, None, None, ResourceConstraints())
    loop = StepLoop(scheduler, kv_cache, hint, max_context_tokens=model_info.max_sequence_length)
    entrance = Entrance(
        model_info=model_info,
        tokenizer=tokenizer,
        make_chooser=lambda params, prompt: RequestSampler(params, prompt, order=sampling_order),
        end_token_ids=frozenset(stop_token_ids),
        max_context_tokens=loop.context_limit_tokens,
        add_special_tokens=config.model.tokenizer.add_special_tokens,
    )
    return LlmEngine(
        loop=loop,
        executor=executor,
        tokenizer=tokenizer,
        entrance=entrance,
        report=EngineReport(loop, kv_cache, model_info, config.scheduler.max_waiting_requests, __version__),
        config=config,
        clock=clock or epoch_clock(),
    )
