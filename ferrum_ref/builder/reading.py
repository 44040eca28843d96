"""Weights by way of a WeightLoader, for code that reads tensor by tensor in its own threads.

Clauses: MB-WEIGHTS-1..4 (specs/model_builder.md).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import CancelledError, InvalidParameterError, ModelError, NotFoundError
from ferrum_ref.interfaces.model_builder import InitializationStrategy
from ferrum_ref.interfaces.weights import (
    QuantizationConfig,
    TensorSpec,
    TensorTransformation,
    WeightLoader,
    WeightSource,
)
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.tensor_names import LM_HEAD, embedding_name, expected_tensors
from ferrum_ref.types.devices import DataType, Device

Array = npt.NDArray[Any]
_NUMPY: Final = {
    DataType.FP32: np.dtype(np.float32),
    DataType.FP16: np.dtype(np.float16),
    DataType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_UNQUANTIZED: Final = ("embed_tokens", "lm_head")  # as usual: the layers' matrices only


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Where each tensor lies, and in which shape."""

    name: str
    sources: Mapping[str, WeightSource]
    shapes: Mapping[str, tuple[int, ...]]

    def require(self, expected: Mapping[str, tuple[int, ...]], tied: str | None = None) -> None:
        """Raises ModelError unless these are exactly the tensors a configuration calls for.  [MB-WEIGHTS-2]

        `tied` may be stored once more: a matrix that the configuration takes from the embedding.
        """
        for name, shape in expected.items():
            if name not in self.shapes:
                raise ModelError(f"build {self.name}: tensor {name}: got nothing, expected shape {list(shape)}")
            if self.shapes[name] != shape:
                raise ModelError(
                    f"build {self.name}: tensor {name}: got shape {list(self.shapes[name])}, expected {list(shape)}"
                )
        extra = [n for n in self.shapes if n not in expected and n != tied and not n.endswith("rotary_emb.inv_freq")]
        if extra:
            raise ModelError(
                f"build {self.name}: got {len(extra)} tensors that the configuration has no place for"
                f" ({', '.join(extra[:3])!r:.200})"
            )


@dataclass(slots=True)
class TensorReader:
    """Stored tensors as arrays, over an asynchronous loader.  [MB-WEIGHTS-1]

    Its `read` is called from worker threads while `loop` runs in another; the loader is only ever used on the loop.
    `before_read` may raise to end the build.
    """

    stored: StoredWeights
    loader: WeightLoader
    loop: asyncio.AbstractEventLoop
    before_read: Callable[[], None]
    quantization: QuantizationConfig | None = None

    def read(self, name: str, dtype: Any = np.float32, out: Array | None = None) -> Array:
        """The tensor, rounded once to `dtype`, or written into `out`.

        Raises NotFoundError (name), ModelError (shape), CancelledError, and what the loader and `before_read` raise.
        """
        element = next((kind for kind, each in _NUMPY.items() if each == np.dtype(dtype)), None)
        if element is None:
            raise InvalidParameterError(f"read tensor {name}: dtype: got {dtype!r}, expected a float type of weights")
        values = self._fetch(name, element)
        if out is None:
            return values
        if out.shape != values.shape:
            raise ModelError(f"read tensor {name}: got shape {values.shape}, expected {out.shape}")
        np.copyto(out, values)
        return out

    def load(self, name: str, shape: tuple[int, ...], dtype: DataType, _: InitializationStrategy) -> Array:
        """The tensor for a recipe; stored tensors need no initialisation.  Raises as `read`."""
        values = self._fetch(name, dtype)
        if values.shape != shape:
            raise ModelError(f"read tensor {name}: got shape {list(values.shape)}, expected {list(shape)}")
        return values

    def _fetch(self, name: str, dtype: DataType) -> Array:
        self.before_read()
        if name not in self.stored.sources:
            raise NotFoundError(f"read tensor {name!r:.200}: no such tensor in {self.stored.name}")
        shape = self.stored.shapes[name]
        steps = [] if self.quantization is None or not _is_quantized(name, shape) else [self.quantization]
        spec = TensorSpec(
            name=name,
            shape=list(shape),
            dtype=dtype,
            device=Device.CPU,
            source=self.stored.sources[name],
            transformations=[TensorTransformation.Quantize(step) for step in steps],
        )
        try:
            loading = asyncio.run_coroutine_threadsafe(self.loader.load_tensor(spec), self.loop)
        except RuntimeError:
            raise CancelledError(f"read tensor {name}: the build was abandoned") from None
        try:
            tensor = loading.result()
        except concurrent.futures.CancelledError:
            raise CancelledError(f"read tensor {name}: the build was abandoned") from None
        values = np.asarray(tensor.to_numpy())
        if values.shape != shape or values.dtype != _NUMPY[dtype]:
            raise ModelError(
                f"read tensor {name}: the loader gave {values.dtype}{list(values.shape)},"
                f" expected {_NUMPY[dtype]}{list(shape)}"
            )
        return values


@dataclass(frozen=True, slots=True)
class DecoderSource:
    """What `models.decoder_weights.read_decoder_weights` reads from: a configuration and its tensors."""

    config: DecoderConfig
    tensors: TensorReader

    def read(self, name: str, dtype: Any = np.float32, out: Array | None = None) -> Array:
        """See `TensorReader.read`."""
        return self.tensors.read(name, dtype, out)


def require_tensors(config: DecoderConfig, reader: TensorReader) -> None:
    """Raises ModelError unless exactly the configuration's tensors are stored.  [MB-WEIGHTS-2]

    A tied output matrix may be stored once more, if it is the same one.
    """
    stored, tied = reader.stored, config.tie_word_embeddings
    stored.require(dict(expected_tensors(config)), LM_HEAD if tied else None)
    embedding = embedding_name(config)
    if tied and LM_HEAD in stored.shapes and not np.array_equal(reader.read(LM_HEAD), reader.read(embedding)):
        raise ModelError(
            f"build {stored.name}: tensor {LM_HEAD}: got values that differ from {embedding}, expected the same ones"
            " since tie_word_embeddings is true"
        )


def _is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and not any(part in name for part in _UNQUANTIZED)
