"""The one place that wires implementations together: a model by name or path becomes something that runs.

    loaded = load_model("smollm2-135m")
    llm = loaded.new_llm()                                              # contiguous caches by text id
    executor, kv_cache = loaded.new_executor(num_blocks=1024)           # paged K/V, for an engine

Clauses: LM-LOAD-1..4 (specs/llm.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ferrum_ref.errors import InvalidParameterError, ResourceExhaustedError
from ferrum_ref.executor.paged import PagedModelExecutor
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.model_executor import AttentionType, ExecutorCapabilities, MemoryRequirements
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvCache, ContiguousKvFactory, KvShape
from ferrum_ref.kv_cache.storage_paged import PagedKvStorage
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_llm import DecoderLlm
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.models.source import resolve_model
from ferrum_ref.plugins import load_backend
from ferrum_ref.tokenizer import load_tokenizer
from ferrum_ref.tokenizer.hugging_face import HuggingFaceTokenizer
from ferrum_ref.types.devices import DataType
from ferrum_ref.types.ids import ModelId
from ferrum_ref.types.models import ModelInfo, ModelType

BLOCK_SIZE_TOKENS = 16


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
        return DecoderLlm(self.decoder, ContiguousKvFactory(self.backend, self.kv_shape, self.decoder.max_tokens))

    def new_executor(
        self,
        num_blocks: int,
        block_size: int = BLOCK_SIZE_TOKENS,
        *,
        enable_prefix_caching: bool = True,
        max_batch_size: int = 32,
    ) -> tuple[PagedModelExecutor, PagedKvCacheManager]:
        """An executor and the manager of its K/V blocks; both start empty.  [LM-LOAD-3]

        Raises InvalidParameterError unless num_blocks and block_size are >= 1.
        """
        storage = PagedKvStorage(self.backend, self.kv_shape, num_blocks, block_size)
        manager = PagedKvCacheManager(
            num_blocks,
            block_size,
            enable_prefix_caching=enable_prefix_caching,
            storage=storage,
            dtype=self.decoder.dtype,
        )
        executor = PagedModelExecutor(
            self.decoder,
            storage,
            self.backend.tensor_factory(),
            self.info,
            self._capabilities(max_batch_size),
            lender=manager,
            head_dim=self.config.head_dim,
        )
        return executor, manager

    def _capabilities(self, max_batch_size: int) -> ExecutorCapabilities:
        config, element = self.config, self.decoder.dtype.size_bytes()
        sharing = AttentionType.MultiHead if config.num_kv_heads == config.num_heads else AttentionType.GroupedQuery
        if config.num_kv_heads == 1 < config.num_heads:
            sharing = AttentionType.MultiQuery
        return ExecutorCapabilities(
            max_batch_size=max_batch_size,
            max_sequence_length=self.decoder.max_tokens,
            attention_mechanisms=[sharing, AttentionType.Paged],
            supports_dynamic_batching=True,
            supports_continuous_batching=True,
            supports_speculative_decoding=False,
            supports_tensor_parallelism=False,
            supports_pipeline_parallelism=False,
            supported_dtypes=[self.decoder.dtype],
            supported_devices=[self.decoder.device],
            memory_requirements=MemoryRequirements(
                parameter_memory=self.decoder.weights.num_bytes(),
                # residual, norm, gate and up, their product: what one token holds at a layer's widest point
                activation_memory_per_token=(2 * config.hidden_size + 3 * config.intermediate_size) * element,
                kv_cache_memory_per_token=self.kv_shape.bytes_per_token() // config.num_layers,
                overhead_memory=self.decoder.max_tokens * config.head_dim * element,  # rotary tables
            ),
        )


def load_model(
    name_or_path: str | Path,
    backend: str | ComputeBackend = "numpy",
    device: str = "cpu",
    *,
    dtype: DataType = DataType.FP32,
    max_tokens: int | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """A model by known name, GGUF file or Hugging Face directory, its weights on a backend.  [LM-LOAD-1..2]

    dtype: element type of weights, activations and K/V; max_tokens: a context shorter than the model's;
    progress(done, total) counts layers. Downloads nothing.
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
        weights = read_decoder_weights(checkpoint, chosen, dtype, progress=progress)
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
