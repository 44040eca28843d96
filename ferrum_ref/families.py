"""Wires the families beside the plain decoder: a model by name or path becomes something that runs.

    embedder = load_embedder("all-minilm-l6-v2")
    vectors = embedder.embed_texts(["one text", "another"])
    speech = load_speech("piper-joe").synthesize("[[həlˈoʊ wˈɜːld.]]", None)
    segments = load_transcriber("whisper-base").transcribe(resample(speech.samples, speech.sample_rate, 16000), None)

Clauses: FM-LOAD-1..4 (specs/families.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ferrum_ref.errors import InvalidFormatError, NotFoundError, UnsupportedError
from ferrum_ref.formats.byte_source import FileBytes
from ferrum_ref.formats.ctranslate2 import CTranslate2File
from ferrum_ref.formats.json_file import read_json_object
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvCache, ContiguousKvFactory, KvShape
from ferrum_ref.models.audio.espeak import EspeakPhonemizer
from ferrum_ref.models.audio.phonemes import Phonemize, TextReader, letter_reader, phoneme_reader
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
from ferrum_ref.models.vits import SpeechControls, VitsModel
from ferrum_ref.models.vits_config import VitsConfig
from ferrum_ref.models.vits_piper import PiperTensors
from ferrum_ref.models.vits_speech import VitsSpeech
from ferrum_ref.models.vits_weights import HfVitsTensors, VitsReader
from ferrum_ref.models.whisper import WhisperModel
from ferrum_ref.models.whisper_config import WhisperConfig, require_front_end
from ferrum_ref.models.whisper_ct2 import Ct2WhisperTensors
from ferrum_ref.models.whisper_tokens import WhisperTokens
from ferrum_ref.models.whisper_transcriber import WhisperTranscriber
from ferrum_ref.models.whisper_weights import HfWhisperTensors, read_whisper_weights
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


def load_transcriber(
    name_or_path: str | Path,
    backend: str | ComputeBackend = "numpy",
    device: str = "cpu",
    *,
    dtype: DataType = DataType.FP32,
    cache_dir: Path | None = None,
) -> WhisperTranscriber:
    """A Whisper model by known name, Hugging Face directory, or CTranslate2 directory (model.bin).  [FM-LOAD-3]

    `.model` is the model itself; `WhisperLm(transcriber.model)` an EncoderDecoderLM. Downloads nothing. Raises as
    `load_embedder` does.
    """
    path = _directory(name_or_path, cache_dir, "a Whisper model")
    chosen = load_backend(backend, device) if isinstance(backend, str) else backend
    settings = read_json_object(path / "config.json")
    element = element_type(dtype)
    if (path / "model.bin").exists():
        converted = _ct2_whisper(path / "model.bin")
        source: Ct2WhisperTensors | HfWhisperTensors = converted
        config = converted.config
    else:
        config = WhisperConfig.from_hf(settings, source=str(path / "config.json"))
        if (path / "generation_config.json").exists():
            settings = read_json_object(path / "generation_config.json")
        source = HfWhisperTensors(path, config)
    try:
        if (path / "preprocessor_config.json").exists():
            file = path / "preprocessor_config.json"
            require_front_end(read_json_object(file), config, str(file))
        model = WhisperModel(config, read_whisper_weights(source, config, chosen, element), chosen)
    finally:
        source.close()
    tokenizer = load_tokenizer(path)
    tokens = WhisperTokens.from_vocabulary(
        tokenizer.token_id, tokenizer.token_text, config.vocab_size, settings, str(path)
    )
    return WhisperTranscriber(model, tokens, lambda ids: tokenizer.decode(ids, skip_special=True))


def _ct2_whisper(path: Path) -> Ct2WhisperTensors:
    """Closed again where it is refused."""
    file = CTranslate2File(FileBytes(path))
    try:
        return Ct2WhisperTensors(file, str(path))
    except BaseException:
        file.close()
        raise


def load_speech(
    name_or_path: str | Path,
    backend: str | ComputeBackend = "numpy",
    device: str = "cpu",
    *,
    seed: int = 0,
    controls: SpeechControls | None = None,
    phonemize: Phonemize | None = None,
    cache_dir: Path | None = None,
) -> VitsSpeech:
    """A VITS voice by known name, Piper file (.onnx with its .onnx.json), or directory of either kind.  [FM-LOAD-4]

    `phonemize`: text to phonemes, where a Piper voice needs them; espeak-ng unless it is given. Downloads nothing.
    Raises as `load_embedder` does.
    """
    path = resolve_model(name_or_path, cache_dir)
    chosen = load_backend(backend, device) if isinstance(backend, str) else backend
    voice_file = _voice_file(path)
    if voice_file is None:
        settings = read_json_object(path / "config.json")
        config = VitsConfig.from_hf(settings, source=str(path / "config.json"))
        source: HfVitsTensors | PiperTensors = HfVitsTensors(path, config)
        reader: TextReader = letter_reader(
            read_json_object(path / "vocab.json"),
            read_json_object(path / "tokenizer_config.json"),
            config.vocab_size,
            str(path),
        )
    else:
        facts = Path(f"{voice_file}.json")
        voice = read_json_object(facts)
        file = FileBytes(voice_file)
        try:
            source = PiperTensors(file, voice)
        finally:
            file.close()
        config = source.config
        reader = phoneme_reader(voice, config.vocab_size, phonemize or _espeak(voice, facts), str(facts))
    try:
        model = VitsModel(config, VitsReader(source, config, chosen).weights(), chosen)
    finally:
        source.close()
    return VitsSpeech(model, reader, seed=seed, controls=controls)


def _voice_file(path: Path) -> Path | None:
    """The .onnx file of a Piper voice; None for a Hugging Face directory.  Raises NotFoundError, UnsupportedError."""
    if path.is_file():
        if path.suffix != ".onnx":
            raise UnsupportedError(f"open model {path}: got a file, expected a Piper voice (.onnx) or a VITS directory")
        return path
    found = sorted(path.glob("*.onnx"))
    if not found:
        if (path / "config.json").exists():
            return None
        raise NotFoundError(f"open model {path}: got neither a .onnx file nor config.json, expected a VITS voice")
    if len(found) > 1:
        raise UnsupportedError(f"open model {path}: got {len(found)} .onnx files, expected one; name the file itself")
    return found[0]


def _espeak(voice: Mapping[str, Any], facts: Path) -> EspeakPhonemizer:
    """With the language that the voice was trained for."""
    settings = voice.get("espeak", {})
    name = settings.get("voice", "en-us") if isinstance(settings, Mapping) else None
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,30}", name):
        raise InvalidFormatError(f"read {facts}: espeak.voice: got {name!r:.80}, expected a language such as 'en-us'")
    return EspeakPhonemizer(name)


def _directory(name_or_path: str | Path, cache_dir: Path | None, kind: str) -> Path:
    path = resolve_model(name_or_path, cache_dir)
    if not path.is_dir():
        raise UnsupportedError(f"open model {path}: got a file, expected the Hugging Face directory of {kind}")
    return path
