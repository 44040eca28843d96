"""Wires the families beside the plain decoder: a model by name or path becomes something that runs.

    embedder = load_embedder("all-minilm-l6-v2")
    vectors = embedder.embed_texts(["one text", "another"])

Clauses: FM-LOAD-1..2 (specs/families.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.formats.json_file import read_json_object
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvCache, ContiguousKvFactory, KvShape
from ferrum_ref.models.bert import BertEncoder
from ferrum_ref.models.bert_config import BertConfig
from ferrum_ref.models.bert_embedding import BertEmbeddingModel, SentenceEmbedder
from ferrum_ref.models.bert_pooling import SentenceSettings
from ferrum_ref.models.bert_weights import read_bert_weights
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_weights import element_type, read_decoder_weights
from ferrum_ref.models.encoder_weights import AffineReader
from ferrum_ref.models.multimodal_config import MultimodalConfig
from ferrum_ref.models.multimodal_llm import ImageEncoder, LlavaLlm
from ferrum_ref.models.multimodal_weights import PROJECTOR, VISION, LanguageTensors, open_multimodal
from ferrum_ref.models.source import resolve_model
from ferrum_ref.models.vision import VisionTower
from ferrum_ref.models.vision_config import PixelScaling
from ferrum_ref.models.vision_weights import read_vision_weights
from ferrum_ref.plugins import load_backend
from ferrum_ref.tokenizer import load_tokenizer
from ferrum_ref.tokenizer.hugging_face import HuggingFaceTokenizer
from ferrum_ref.types.devices import DataType


def load_embedder(
    name_or_path: str | Path,
    backend: str | ComputeBackend = "numpy",
    device: str = "cpu",
    *,
    dtype: DataType = DataType.FP32,
    cache_dir: Path | None = None,
) -> SentenceEmbedder:
    """A BERT-style embedding model by known name or Hugging Face directory.  Downloads nothing.  [FM-LOAD-1]

    Raises NotFoundError (model, backend, tokenizer), UnsupportedError (architecture, module, backend not available),
    InvalidFormatError, InvalidParameterError (dtype), FerrumIOError.
    """
    path = _directory(name_or_path, cache_dir, "an embedding model")
    chosen = load_backend(backend, device) if isinstance(backend, str) else backend
    config = BertConfig.from_hf(read_json_object(path / "config.json"), source=str(path / "config.json"))
    settings = SentenceSettings.from_directory(path, config.max_position_embeddings)
    tokenizer = load_tokenizer(path)
    encoder = BertEncoder(config, read_bert_weights(path, config, chosen, dtype), chosen)
    return SentenceEmbedder(BertEmbeddingModel(encoder, settings), tokenizer)


@dataclass(frozen=True, slots=True)
class LoadedMultimodal:
    """A LLaVA model ready to run.  [FM-LOAD-2]"""

    config: MultimodalConfig
    tokenizer: HuggingFaceTokenizer | None
    decoder: Decoder
    images: ImageEncoder
    backend: ComputeBackend
    path: Path

    def new_llm(self) -> LlavaLlm[ContiguousKvCache]:
        """A `MultimodalLLM` with its own contiguous caches."""
        text = self.config.text
        shape = KvShape(text.num_layers, text.num_kv_heads, text.head_dim, self.decoder.dtype, self.decoder.device)
        caches = ContiguousKvFactory(self.backend, shape, self.decoder.max_tokens)
        return LlavaLlm(self.decoder, caches, self.images)


def load_multimodal(
    name_or_path: str | Path,
    backend: str | ComputeBackend = "numpy",
    device: str = "cpu",
    *,
    dtype: DataType = DataType.FP32,
    max_tokens: int | None = None,
    cache_dir: Path | None = None,
) -> LoadedMultimodal:
    """A LLaVA model (CLIP tower, projector, Llama decoder) from a Hugging Face directory.  [FM-LOAD-2]

    A directory without tokenizer.json has no tokenizer. Downloads nothing. Raises as `load_embedder` does.
    """
    path = _directory(name_or_path, cache_dir, "a LLaVA model")
    chosen = load_backend(backend, device) if isinstance(backend, str) else backend
    config = MultimodalConfig.from_hf(read_json_object(path / "config.json"), source=str(path / "config.json"))
    scaling = PixelScaling.from_directory(path)
    element = element_type(dtype)
    with open_multimodal(path, config) as tensors:
        reader = AffineReader(tensors, chosen, element, config.vision.layer_norm_eps)
        vision = read_vision_weights(reader, config.vision, VISION, max(config.feature_layers))
        projector = (
            reader.affine(f"{PROJECTOR}linear_1", bias=config.projector_bias),
            reader.affine(f"{PROJECTOR}linear_2", bias=config.projector_bias),
        )
        weights = read_decoder_weights(LanguageTensors(tensors, config.text), chosen, dtype)
    tower = VisionTower(config.vision, vision, chosen, scaling)
    return LoadedMultimodal(
        config=config,
        tokenizer=load_tokenizer(path) if (path / "tokenizer.json").exists() else None,
        decoder=Decoder(config.text, weights, chosen, max_tokens),
        images=ImageEncoder(config, tower, projector, chosen),
        backend=chosen,
        path=path,
    )


def _directory(name_or_path: str | Path, cache_dir: Path | None, kind: str) -> Path:
    path = resolve_model(name_or_path, cache_dir)
    if not path.is_dir():
        raise UnsupportedError(f"open model {path}: got a file, expected the Hugging Face directory of {kind}")
    return path
