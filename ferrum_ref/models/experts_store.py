"""Experts as files hold them, presented one by one: a store of tensors over another.

    Mixtral          block_sparse_moe.experts.i.w1 / w3 / w2          gate / up / down
    stacked          mlp.experts.gate_up_proj `[n, 2F, E]`, down_proj `[n, E, F]`; gate_proj, up_proj `[n, F, E]`
    gpt-oss          the same transposed, `[n, E, 2F]` and `[n, F, E]`, gate and up in turn along 2F
    gpt-oss, MXFP4   *_blocks `[n, out, in/32, 16]` and *_scales `[n, out, in/32]`, or ggml's blocks of both

A stacked tensor's experts stay views into its bytes; transposed ones and MXFP4 are put together when they are read.
Clauses: MD-EXPERT-1..4 (specs/decoder_families.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidFormatError
from ferrum_ref.kernels.quant import FORMATS, quant_format
from ferrum_ref.kernels.quant_matrix import QuantMatrix, RowMatrix
from ferrum_ref.models.experts_mxfp4 import BLOCK_BYTES, mxfp4_as_bf16

if TYPE_CHECKING:
    from ferrum_ref.models.checkpoint import TensorEntry, TensorStore

Bytes = NDArray[np.uint8]
_MIXTRAL: Final = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_EXPERT: Final = re.compile(r"(model\.layers\.\d+\.)block_sparse_moe\.experts\.(\d+)\.(w[123])\.(weight|bias)")
_ROUTER: Final = re.compile(r"(model\.layers\.\d+\.)(?:block_sparse_moe\.gate|mlp\.router)\.(weight|bias)")
_STACKED: Final = re.compile(
    r"(model\.layers\.\d+\.)(?:mlp|block_sparse_moe)\.experts\.(gate_up|gate|up|down)_proj(\.weight|\.bias|_bias|_blocks|)"
)
_MXFP4_ELEMENTS: Final = 2 * BLOCK_BYTES
_BF16_BYTES: Final = 2


@dataclass(frozen=True, slots=True)
class _View:
    """A canonical tensor, and how its bytes come about."""

    entry: TensorEntry
    packed: Callable[[], Bytes]
    stored_name: str
    is_whole: bool  # the stored tensor itself, under another name


class ExpertStore:
    """Every tensor of `store`; routers and experts under their canonical names.  [MD-EXPERT-1..4]"""

    def __init__(self, store: TensorStore, *, transposed: bool = False, skipped: re.Pattern[str] | None = None) -> None:
        """`transposed`: stacked experts lie as gpt-oss has them. Tensors that `skipped` matches are left out.

        Raises InvalidFormatError, naming the tensor, where a stack cannot be taken apart or two tensors are one.
        """
        self._store = store
        self._transposed = transposed
        views: dict[str, _View] = {}
        for name, entry in store.entries.items():
            if skipped is not None and skipped.fullmatch(name):
                continue
            for view in self._views(name, entry):
                if view.entry.name in views:
                    raise InvalidFormatError(f"read experts: tensor {name}: got {view.entry.name} a second time")
                views[view.entry.name] = view
        self._views_by_name = views
        self.entries: Mapping[str, TensorEntry] = MappingProxyType({name: view.entry for name, view in views.items()})

    @property
    def format(self) -> str:
        return self._store.format

    @property
    def num_bytes(self) -> int:
        return self._store.num_bytes

    def packed(self, name: str) -> Bytes:
        return self._views_by_name[name].packed()

    def matrix(self, name: str) -> QuantMatrix | None:
        """The stored form of a matrix; None for a tensor of another rank or format."""
        view = self._views_by_name[name]
        inner = getattr(self._store, "matrix", None)
        if view.is_whole and inner is not None:
            found: QuantMatrix | None = inner(view.stored_name)
            return found
        if len(view.entry.shape) != 2 or view.entry.dtype not in FORMATS:
            return None
        return RowMatrix(view.packed(), view.entry.dtype)

    def release(self, name: str) -> None:
        """Let the pages of the stored tensor leave resident memory, where the store can."""
        if (give_back := getattr(self._store, "release", None)) is not None:
            give_back(self._views_by_name[name].stored_name)

    def close(self) -> None:
        self._store.close()

    def _views(self, name: str, entry: TensorEntry) -> Iterator[_View]:
        """What one stored tensor is presented as."""
        if match := _EXPERT.fullmatch(name):
            yield self._renamed(entry, f"{match[1]}mlp.experts.{match[2]}.{_MIXTRAL[match[3]]}.{match[4]}")
        elif match := _ROUTER.fullmatch(name):
            yield self._renamed(entry, f"{match[1]}mlp.gate.{match[2]}")
        elif match := _STACKED.fullmatch(name):
            yield from self._stack(entry, f"{match[1]}mlp.experts.", match[2], match[3])
        elif not name.endswith("_proj_scales"):  # those belong to the blocks of the same name
            yield self._renamed(entry, name)

    def _renamed(self, entry: TensorEntry, name: str) -> _View:
        return _View(replace(entry, name=name), lambda: self._store.packed(entry.name), entry.name, True)

    def _stack(self, entry: TensorEntry, prefix: str, parts: str, kind: str) -> Iterator[_View]:
        is_bias = kind.endswith("bias")
        expected_rank = {"_blocks": 4}.get(kind, 2 if is_bias else 3)
        if len(entry.shape) != expected_rank or not entry.shape[0]:
            raise InvalidFormatError(
                f"read experts: tensor {entry.name}: got shape {list(entry.shape)}, expected {expected_rank} dimensions"
            )
        names = ("gate_proj", "up_proj") if parts == "gate_up" else (f"{parts}_proj",)
        if is_bias:
            cut, shape = self._biases, entry.shape[1:]
        elif entry.dtype == "MXFP4":
            cut, shape = self._mxfp4_rows, entry.shape[1:]
        elif kind == "_blocks":
            cut, shape = self._mxfp4, (entry.shape[1], entry.shape[2] * _MXFP4_ELEMENTS)
        elif self._transposed and entry.dtype in ("F32", "F16", "BF16", "F64") and not kind:
            cut, shape = self._turned, entry.shape[:0:-1]
        else:
            cut, shape = self._rows, entry.shape[1:]
        if shape[0] % len(names):
            raise InvalidFormatError(
                f"read experts: tensor {entry.name}: got {shape[0]} rows, expected an even number: gate and up"
            )
        shape = (shape[0] // len(names), *shape[1:])
        dtype = "BF16" if kind == "_blocks" or entry.dtype == "MXFP4" else entry.dtype
        num_bytes = self._num_bytes(entry, kind) // (entry.shape[0] * len(names))
        for index in range(entry.shape[0]):
            for place, part in enumerate(names):
                name = f"{prefix}{index}.{part}.{'bias' if is_bias else 'weight'}"
                yield _View(
                    replace(entry, name=name, shape=shape, dtype=dtype, num_bytes=num_bytes),
                    _bound(cut, entry, index, place, len(names)),
                    entry.name,
                    False,
                )

    def _num_bytes(self, entry: TensorEntry, kind: str) -> int:
        if kind != "_blocks":
            return entry.num_bytes
        scales = self._store.entries.get(_scales_of(entry.name))
        if scales is None or scales.shape != entry.shape[:-1] or entry.shape[-1] != BLOCK_BYTES:
            found = "nothing" if scales is None else f"shape {list(scales.shape)}"
            raise InvalidFormatError(
                f"read experts: tensor {_scales_of(entry.name)}: got {found}, expected {list(entry.shape[:-1])} beside "
                f"blocks {list(entry.shape)} of {BLOCK_BYTES} bytes"
            )
        return entry.num_bytes + scales.num_bytes

    def _of_part(self, stack: Bytes, place: int, num_parts: int) -> Bytes:
        """Gate's or up's rows of one expert: in turn, or one half after the other."""
        if self._transposed:
            return stack[place::num_parts]
        rows = len(stack) // num_parts
        return stack[place * rows : (place + 1) * rows]

    def _rows(self, entry: TensorEntry, index: int, place: int, num_parts: int) -> Bytes:
        rows = self._store.packed(entry.name)[index]
        return np.ascontiguousarray(self._of_part(rows, place, num_parts))

    def _biases(self, entry: TensorEntry, index: int, place: int, num_parts: int) -> Bytes:
        size = quant_format(entry.dtype).block_bytes
        values = self._store.packed(entry.name)[index].reshape(-1, size)
        return np.ascontiguousarray(self._of_part(values, place, num_parts)).reshape(-1)

    def _turned(self, entry: TensorEntry, index: int, place: int, num_parts: int) -> Bytes:
        """`[in, out]` of one expert -> the part's rows `[out, in]`."""
        size = quant_format(entry.dtype).block_bytes
        inputs, outputs = entry.shape[1:]
        values = self._store.packed(entry.name)[index].reshape(inputs, outputs, size)
        rows = self._of_part(values.swapaxes(0, 1), place, num_parts)
        return np.ascontiguousarray(rows).reshape(len(rows), inputs * size)

    def _mxfp4(self, entry: TensorEntry, index: int, place: int, num_parts: int) -> Bytes:
        blocks = self._store.packed(entry.name)[index].reshape(*entry.shape[1:])
        scales = self._store.packed(_scales_of(entry.name))[index].reshape(*entry.shape[1:-1])
        return mxfp4_as_bf16(self._of_part(blocks, place, num_parts), self._of_part(scales, place, num_parts))

    def _mxfp4_rows(self, entry: TensorEntry, index: int, place: int, num_parts: int) -> Bytes:
        """ggml's blocks: the scale, then the nibbles of both halves."""
        rows = self._of_part(self._store.packed(entry.name)[index], place, num_parts)
        blocks = rows.reshape(len(rows), -1, 1 + BLOCK_BYTES)
        return mxfp4_as_bf16(blocks[..., 1:], blocks[..., 0], halves=True)


def _scales_of(blocks: str) -> str:
    return blocks.removesuffix("_blocks") + "_scales"


def _bound(cut: Callable[..., Bytes], *args: Any) -> Callable[[], Bytes]:
    return lambda: cut(*args)
