"""The one place that wires implementations together: a model by name or path becomes something that runs.

    loaded = load_model("smollm2-135m")
    llm = loaded.new_llm()                                              # contiguous caches by text id
    llm = loaded.new_stepped_llm()                                      # the same, decoding by the backend's own step
    executor, kv_cache = loaded.new_executor(num_blocks=1024)           # paged K/V, for an engine
    decoder = loaded.new_speculative(ngram=3)                           # drafts by prompt lookup, verifies by model

Clauses: LM-LOAD-1..5 (specs/llm.md), MX-FACTORY-5, MX-STATUS-5, MX-ASSEMBLY-1..2 (specs/model_executor.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ferrum_ref.errors import ConfigError, InvalidParameterError, ModelError, ResourceExhaustedError, UnsupportedError
from ferrum_ref.executor.batch import PagedBatchExecutor
from ferrum_ref.executor.factory import ConfiguredExecutorFactory, plan_executor, sharing_of
from ferrum_ref.executor.paged import PagedModelExecutor
from ferrum_ref.executor.proposers import DraftModelProposer, NgramProposer, Proposer
from ferrum_ref.executor.speculative import PagedSpeculativeExecutor
from ferrum_ref.executor.speculative_decoder import SpeculativeDecoder
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.decode_backend import DecodeBackend
from ferrum_ref.interfaces.model_executor import (
    AttentionType,
    ExecutorCapabilities,
    ExecutorConfig,
    ExecutorType,
    MemoryRequirements,
    ModelExecutor,
)
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvCache, ContiguousKvFactory, KvShape
from ferrum_ref.kv_cache.storage_latent import LatentKvFactory, LatentKvStorage
from ferrum_ref.kv_cache.storage_paged import PagedKvStorage
from ferrum_ref.kv_cache.storage_rollback import RollbackKvCacheManager
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_llm import DecoderLlm
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.models.source import resolve_model
from ferrum_ref.models.stepped_llm import SteppedLlm
from ferrum_ref.models.transformer_weights import DecoderTransformerWeights
from ferrum_ref.plugins import load_backend
from ferrum_ref.tokenizer import load_tokenizer
from ferrum_ref.tokenizer.hugging_face import HuggingFaceTokenizer
from ferrum_ref.types.devices import DataType
from ferrum_ref.types.ids import ModelId
from ferrum_ref.types.models import ModelInfo, ModelType
from ferrum_ref.types.parity_mode import ParityMode
from ferrum_ref.types.sampling import SamplingParams

BLOCK_SIZE_TOKENS = 16
Executor = TypeVar("Executor", bound=PagedModelExecutor)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.  [LM-LOAD-1]"""

    info: ModelInfo
    config: DecoderConfig
    tokenizer: HuggingFaceTokenizer
    decoder: Decoder
    backend: ComputeBackend
    path: Path
    stop_token_ids: frozenset[int]

    @property
    def kv_shape(self) -> KvShape:
        """Sizes of one cached token."""
        config = self.config
        return KvShape(config.num_layers, config.num_kv_heads, config.head_dim, self.decoder.dtype, self.decoder.device)

    def new_llm(self) -> DecoderLlm[ContiguousKvCache]:
        """A `DecoderOnlyLLM` with its own contiguous caches."""
        kind = ContiguousKvFactory if self.config.latent is None else LatentKvFactory
        return DecoderLlm(self.decoder, kind(self.backend, self.kv_shape, self.decoder.max_tokens))

    def new_stepped_llm(self) -> SteppedLlm[ContiguousKvCache]:
        """As `new_llm`; what follows a prompt is decoded by the backend's own decode step.  [LM-LOAD-5]

        Raises UnsupportedError: the backend offers no `make_decode_backend`; the model computes more than
        `TransformerWeights` can say (the fields are named); packed matrices that the backend's step does not take.
        """
        make = getattr(self.backend, "make_decode_backend", None)
        if not callable(make):
            raise UnsupportedError(
                f"new_stepped_llm: backend {self.backend.name()!r} offers no decode step (make_decode_backend)"
            )
        step: DecodeBackend = make(DecoderTransformerWeights.of_decoder(self.decoder))
        caches = ContiguousKvFactory(self.backend, self.kv_shape, self.decoder.max_tokens)
        return SteppedLlm(self.decoder, caches, step)

    def new_executor(
        self,
        num_blocks: int,
        block_size: int = BLOCK_SIZE_TOKENS,
        *,
        enable_prefix_caching: bool = True,
        max_batch_size: int = 32,
        clock: Callable[[], float] = time.monotonic,
        parity_mode: ParityMode = ParityMode.REFERENCE,
    ) -> tuple[PagedModelExecutor, RollbackKvCacheManager]:
        """An executor and the manager of its K/V blocks; both start empty.  [LM-LOAD-3]

        Raises InvalidParameterError unless num_blocks and block_size are >= 1.
        """
        options = (num_blocks, block_size, enable_prefix_caching, max_batch_size, clock, parity_mode)
        return self._new_executor(PagedModelExecutor, *options)

    def new_batch_executor(
        self,
        num_blocks: int,
        block_size: int = BLOCK_SIZE_TOKENS,
        *,
        enable_prefix_caching: bool = True,
        max_batch_size: int = 32,
        clock: Callable[[], float] = time.monotonic,
    ) -> tuple[PagedBatchExecutor, RollbackKvCacheManager]:
        """As `new_executor`, with the batch contract.  [MX-ASSEMBLY-1]"""
        options = (num_blocks, block_size, enable_prefix_caching, max_batch_size, clock, ParityMode.REFERENCE)
        return self._new_executor(PagedBatchExecutor, *options)

    def new_speculative_executor(
        self,
        num_blocks: int,
        block_size: int = BLOCK_SIZE_TOKENS,
        *,
        enable_prefix_caching: bool = True,
        max_batch_size: int = 32,
        clock: Callable[[], float] = time.monotonic,
    ) -> tuple[PagedSpeculativeExecutor, RollbackKvCacheManager]:
        """As `new_executor`, with the speculative contract.  [MX-ASSEMBLY-1]"""
        options = (num_blocks, block_size, enable_prefix_caching, max_batch_size, clock, ParityMode.REFERENCE)
        return self._new_executor(PagedSpeculativeExecutor, *options)

    def new_speculative(
        self,
        sampling: SamplingParams | None = None,
        *,
        draft: LoadedModel | None = None,
        ngram: int | None = None,
        num_speculative_tokens: int = 4,
        max_batch_size: int = 1,
        draft_temperature: float | None = None,
        block_size: int = BLOCK_SIZE_TOKENS,
    ) -> SpeculativeDecoder:
        """A decoder that drafts with another model (`draft`) or by looking up n-grams, and verifies with this one.

        sampling None: greedy. draft_temperature None: the sampling's. Blocks for max_batch_size texts of the whole
        context, taken from memory as they fill.  [MX-ASSEMBLY-2]
        Raises InvalidParameterError unless exactly one of draft and ngram is given, ModelError where the vocabularies
        differ.
        """
        if (draft is None) == (ngram is None):
            raise InvalidParameterError("new_speculative: give either a draft model or an ngram length")
        proposer: Proposer = NgramProposer(ngram) if ngram is not None else NgramProposer()
        if draft is not None:
            if draft.info.vocab_size != self.info.vocab_size:
                raise ModelError(
                    f"new_speculative: the draft's vocabulary has {draft.info.vocab_size} tokens, the target's"
                    f" {self.info.vocab_size}; both models must share one"
                )
            temperature = sampling.temperature if sampling is not None else 0.0
            drafting, _ = draft.new_executor(draft._whole_context(max_batch_size, block_size), block_size)
            proposer = DraftModelProposer(drafting, temperature if draft_temperature is None else draft_temperature)
        target, _ = self.new_speculative_executor(
            self._whole_context(max_batch_size, block_size), block_size, max_batch_size=max_batch_size
        )
        return SpeculativeDecoder(target, proposer, sampling, num_speculative_tokens=num_speculative_tokens)

    def shortened(self, max_tokens: int) -> LoadedModel:
        """The same model with a context of at most `max_tokens`; weights are shared. Pure."""
        decoder = Decoder(self.config, self.decoder.weights, self.backend, max_tokens)
        return replace(self, decoder=decoder, info=replace(self.info, max_sequence_length=decoder.max_tokens))

    def _new_executor(
        self,
        kind: type[Executor],
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool,
        max_batch_size: int,
        clock: Callable[[], float],
        parity_mode: ParityMode,
    ) -> tuple[Executor, RollbackKvCacheManager]:
        paged = PagedKvStorage if self.config.latent is None else LatentKvStorage
        storage = paged(self.backend, self.kv_shape, num_blocks, block_size)
        manager = RollbackKvCacheManager(
            num_blocks,
            block_size,
            enable_prefix_caching=enable_prefix_caching,
            storage=storage,
            dtype=self.decoder.dtype,
        )
        executor = kind(
            self.decoder,
            storage,
            self.backend.tensor_factory(),
            self.info,
            self._capabilities(max_batch_size, issubclass(kind, PagedSpeculativeExecutor)),
            lender=manager,
            head_dim=self.config.head_dim,
            clock=clock,
            parity_mode=parity_mode,
        )
        return executor, manager

    def _whole_context(self, max_batch_size: int, block_size: int) -> int:
        """Blocks that hold max_batch_size texts of the longest kind."""
        return max_batch_size * -(-self.decoder.max_tokens // block_size)

    def _capabilities(self, max_batch_size: int, is_speculative: bool) -> ExecutorCapabilities:
        config = self.config
        mechanisms = [sharing_of(config.num_heads, config.num_kv_heads), AttentionType.Paged]
        if self.backend.capabilities().supports_flash_attention:
            mechanisms.append(AttentionType.Flash)
        return ExecutorCapabilities(
            max_batch_size=max_batch_size,
            max_sequence_length=self.decoder.max_tokens,
            attention_mechanisms=mechanisms,
            supports_dynamic_batching=True,
            supports_continuous_batching=True,
            supports_speculative_decoding=is_speculative,
            supports_tensor_parallelism=False,
            supports_pipeline_parallelism=False,
            supported_dtypes=[self.decoder.dtype],
            supported_devices=[self.decoder.device],
            memory_requirements=self._memory_requirements(max_batch_size),
        )

    def _memory_requirements(self, max_batch_size: int) -> MemoryRequirements:
        """Weights and K/V exactly; activations as an upper bound of what was measured on numpy.  [MX-STATUS-5]"""
        config, element = self.config, self.decoder.dtype.size_bytes()
        heads, kv_heads = config.num_heads, config.num_kv_heads
        # A layer is widest in its feed-forward or in its attention: projections, their rotated and gathered copies,
        # and the scores of 64 queries at a time. Residual, norm and their updates stay beside either.
        attention = 4 * (heads + 2 * kv_heads) * config.head_dim + 64 * heads
        widest = 4 * config.hidden_size + max(5 * config.intermediate_size, attention)
        rotary_tables = self.decoder.max_tokens * config.head_dim * element
        return MemoryRequirements(
            parameter_memory=self.decoder.weights.num_bytes(),
            activation_memory_per_token=widest * max(element, 4),
            kv_cache_memory_per_token=self.kv_shape.bytes_per_token() // config.num_layers,
            overhead_memory=rotary_tables + max_batch_size * config.vocab_size * 4,  # a row of logits a sequence
        )


def new_executor_factory(
    find_model: Callable[[ExecutorConfig], LoadedModel], backend: ComputeBackend
) -> ConfiguredExecutorFactory:
    """Executors from settings, over models that `find_model` finds (or loads) for them.  [MX-FACTORY-5]

    Raises ConfigError where the settings contradict the model that was found.
    """

    def build(config: ExecutorConfig, kind: ExecutorType) -> ModelExecutor:
        found = find_model(config)
        _check_same_model(config, found)
        loaded = found.shortened(config.max_sequence_length)
        plan = plan_executor(config, kind, loaded.kv_shape.bytes_per_token())
        classes = {
            ExecutorType.Sequential: PagedModelExecutor,
            ExecutorType.Batch: PagedBatchExecutor,
            ExecutorType.ContinuousBatch: PagedBatchExecutor,
            ExecutorType.Speculative: PagedSpeculativeExecutor,
        }
        limits = (plan.num_blocks, plan.block_size, plan.enable_prefix_caching, plan.max_batch_size)
        executor, _ = loaded._new_executor(classes[kind], *limits, time.monotonic, ParityMode.REFERENCE)
        return executor

    return ConfiguredExecutorFactory(build, backend.capabilities(), has_fused_kernels=backend.kernel_ops() is not None)


def _check_same_model(config: ExecutorConfig, found: LoadedModel) -> None:
    """Raises ConfigError naming the first fact in which the settings and the model differ."""
    wanted, have = config.model_info, found.info
    facts = {
        name: (getattr(wanted, name), getattr(have, name))
        for name in ("model_id", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "vocab_size")
    }
    facts |= {"dtype": (config.dtype, have.dtype), "device": (config.device, have.device)}
    for name, (asked, got) in facts.items():
        if asked != got:
            raise ConfigError(f"ExecutorConfig: {name} is {asked}, but the model that was loaded has {got}")
    window = config.attention_config.sliding_window_size
    if window is not None and window != getattr(found.config, "sliding_window", None):
        raise UnsupportedError(f"ExecutorConfig: this model has no sliding window of {window} tokens; leave it None")


def load_model(
    name_or_path: str | Path,
    backend: str | ComputeBackend = "numpy",
    device: str = "cpu",
    *,
    dtype: DataType = DataType.FP32,
    max_tokens: int | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    packed: bool = False,
) -> LoadedModel:
    """A model by known name, GGUF file or Hugging Face directory, its weights on a backend.  [LM-LOAD-1..2]

    dtype: element type of weights, activations and K/V; max_tokens: a context shorter than the model's;
    progress(done, total) counts layers; packed: matrices stay in the form and in the memory of their file where the
    backend multiplies by it: less memory; slower on numpy, faster where a decode step reads them.  [MD-PACK-2]
    Downloads nothing.
    Raises NotFoundError (model, backend), UnsupportedError (backend not available, architecture), InvalidFormatError,
    InvalidParameterError (dtype, max_tokens), FerrumIOError.
    """
    if max_tokens is not None and max_tokens < 1:
        raise InvalidParameterError(f"load_model: max_tokens must be >= 1, got {max_tokens}")
    chosen = load_backend(backend, device) if isinstance(backend, str) else backend
    path = resolve_model(name_or_path, cache_dir)
    tokenizer = load_tokenizer(path)
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config
        weights = read_decoder_weights(checkpoint, chosen, dtype, progress=progress, packed=packed)
        num_parameters = checkpoint.num_parameters
        stop_token_ids = tokenizer.stop_token_ids | {*config.eos_token_ids, *checkpoint.generation.eos_token_ids}
    decoder = Decoder(config, weights, chosen, max_tokens)
    info = ModelInfo(
        model_id=ModelId(str(name_or_path)),
        model_type=ModelType.Llama if config.architecture == "llama" else ModelType.Custom(config.architecture),
        num_parameters=num_parameters,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        vocab_size=config.vocab_size,
        max_sequence_length=decoder.max_tokens,
        dtype=decoder.dtype,
        device=decoder.device,
        version=None,
        license=None,
        metadata={"head_dim": config.head_dim, "backend": chosen.name()},
    )
    return LoadedModel(info, config, tokenizer, decoder, chosen, path, frozenset(stop_token_ids))


def plan_kv_blocks(
    kv_shape: KvShape,
    memory_bytes: int,
    block_size: int = BLOCK_SIZE_TOKENS,
    *,
    max_tokens: int | None = None,
    max_num_seqs: int = 1,
) -> int:
    """Blocks that fit into `memory_bytes`, but no more than max_num_seqs sequences of max_tokens can use.  [LM-LOAD-4]

    floor(memory / (block_size * bytes per token)).  Pure.  Raises InvalidParameterError for a size below 1,
    ResourceExhaustedError if not even one block fits.
    """
    if block_size < 1 or max_num_seqs < 1 or (max_tokens is not None and max_tokens < 1):
        raise InvalidParameterError(
            f"plan_kv_blocks: expected block_size, max_tokens and max_num_seqs >= 1,"
            f" got {block_size}, {max_tokens}, {max_num_seqs}"
        )
    block_bytes = block_size * kv_shape.bytes_per_token()
    num_blocks = memory_bytes // block_bytes
    if num_blocks < 1:
        raise ResourceExhaustedError(
            f"plan_kv_blocks: one block of {block_size} tokens takes {block_bytes} bytes, but only {memory_bytes} are"
            " given; give more memory or make blocks smaller"
        )
    if max_tokens is None:
        return num_blocks
    return min(num_blocks, max_num_seqs * -(-max_tokens // block_size))
