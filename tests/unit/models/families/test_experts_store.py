"""Experts of every file form, taken apart into the canonical tensors: same bytes, no copies where rows are kept."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ferrum_ref.errors import InvalidFormatError, ShapeError
from ferrum_ref.kernels.quant import decode
from ferrum_ref.models.checkpoint import TensorEntry
from ferrum_ref.models.experts_mxfp4 import mxfp4_as_bf16
from ferrum_ref.models.experts_store import ExpertStore

N, F, E = 3, 4, 6
RNG = np.random.default_rng(0)
LABELS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "uint8": "U8"}


class Memory:
    """A store over arrays."""

    format = "safetensors"

    def __init__(self, **tensors: Any) -> None:
        self.arrays = {name.replace("__", "."): np.ascontiguousarray(values) for name, values in tensors.items()}
        self.entries = {
            name: TensorEntry(name, values.shape, LABELS[values.dtype.name], values.nbytes)
            for name, values in self.arrays.items()
        }
        self.closed = False
        self.released: list[str] = []

    @property
    def num_bytes(self) -> int:
        return sum(values.nbytes for values in self.arrays.values())

    def packed(self, name: str) -> Any:
        values = self.arrays[name]
        return values.view(np.uint8).reshape(*values.shape[:-1], -1)

    def release(self, name: str) -> None:
        self.released.append(name)

    def close(self) -> None:
        self.closed = True


def number(*shape: int, dtype: Any = np.float32) -> Any:
    return RNG.standard_normal(shape).astype(dtype)


def values_of(store: ExpertStore, name: str) -> Any:
    entry = store.entries[name]
    found = decode(entry.dtype, store.packed(name))
    assert found.shape == entry.shape
    return found


LAYER = "model__layers__1__"
MLP = "model.layers.1.mlp."


@pytest.mark.clause("MD-EXPERT-1")
def test_mixtral_names_are_the_canonical_ones() -> None:
    moe = f"{LAYER}block_sparse_moe__"
    parts = {"w1": number(F, E), "w2": number(E, F), "w3": number(F, E)}
    inner = Memory(
        **{f"{moe}experts__2__{name}__weight": values for name, values in parts.items()},
        **{f"{moe}gate__weight": number(N, E), "model__norm__weight": number(E)},
    )
    store = ExpertStore(inner)
    assert set(store.entries) == {
        f"{MLP}gate.weight",
        "model.norm.weight",
        *(f"{MLP}experts.2.{part}_proj.weight" for part in ("gate", "up", "down")),
    }
    for part, name in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        assert np.array_equal(values_of(store, f"{MLP}experts.2.{part}_proj.weight"), parts[name])
    matrix = store.matrix(f"{MLP}experts.2.up_proj.weight")
    assert matrix is not None
    assert np.array_equal(matrix.rows(0, F), parts["w3"])
    assert store.matrix("model.norm.weight") is None
    assert (store.format, store.num_bytes) == ("safetensors", inner.num_bytes)
    store.close()
    assert inner.closed


@pytest.mark.clause("MD-EXPERT-2")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_stacked_experts_are_views_into_the_stack(dtype: Any) -> None:
    gate_up, down = number(N, 2 * F, E, dtype=dtype), number(N, E, F, dtype=dtype)
    inner = Memory(**{f"{LAYER}mlp__experts__gate_up_proj": gate_up, f"{LAYER}mlp__experts__down_proj": down})
    store = ExpertStore(inner)
    assert len(store.entries) == 3 * N
    for index in range(N):
        prefix = f"{MLP}experts.{index}."
        assert np.array_equal(values_of(store, f"{prefix}gate_proj.weight"), gate_up[index, :F])
        assert np.array_equal(values_of(store, f"{prefix}up_proj.weight"), gate_up[index, F:])
        assert np.array_equal(values_of(store, f"{prefix}down_proj.weight"), down[index])
        assert np.shares_memory(store.packed(f"{prefix}up_proj.weight"), inner.arrays[f"{MLP}experts.gate_up_proj"])
    assert sum(entry.num_bytes for entry in store.entries.values()) == inner.num_bytes
    store.release(f"{MLP}experts.2.up_proj.weight")
    assert inner.released == [f"{MLP}experts.gate_up_proj"]
    separate = ExpertStore(
        Memory(**{f"{LAYER}mlp__experts__{part}_proj__weight": gate_up[:, :F] for part in ("gate", "up")})
    )
    assert np.array_equal(values_of(separate, f"{MLP}experts.1.up_proj.weight"), gate_up[1, :F])


@pytest.mark.clause("MD-EXPERT-3")
def test_transposed_stacks_have_gate_and_up_in_turn() -> None:
    gate_up, down = number(N, E, 2 * F, dtype=ml_dtypes.bfloat16), number(N, F, E)
    gate_up_bias, down_bias = number(N, 2 * F), number(N, E)
    router = number(N)
    experts = f"{LAYER}mlp__experts__"
    store = ExpertStore(
        Memory(
            **{
                f"{experts}gate_up_proj": gate_up,
                f"{experts}gate_up_proj_bias": gate_up_bias,
                f"{experts}down_proj": down,
                f"{experts}down_proj_bias": down_bias,
                f"{LAYER}mlp__router__bias": router,
            }
        ),
        transposed=True,
    )
    assert len(store.entries) == 6 * N + 1
    for index in range(N):
        prefix = f"{MLP}experts.{index}."
        assert np.array_equal(values_of(store, f"{prefix}gate_proj.weight"), gate_up[index, :, 0::2].T)
        assert np.array_equal(values_of(store, f"{prefix}up_proj.weight"), gate_up[index, :, 1::2].T)
        assert np.array_equal(values_of(store, f"{prefix}down_proj.weight"), down[index].T)
        assert np.array_equal(values_of(store, f"{prefix}gate_proj.bias"), gate_up_bias[index, 0::2])
        assert np.array_equal(values_of(store, f"{prefix}up_proj.bias"), gate_up_bias[index, 1::2])
        assert np.array_equal(values_of(store, f"{prefix}down_proj.bias"), down_bias[index])
    assert np.array_equal(values_of(store, f"{MLP}gate.bias"), router)


@pytest.mark.clause("MD-EXPERT-4")
def test_mxfp4_equals_transformers_dequantisation() -> None:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = RNG.integers(0, 256, (N, 2 * F, 2, 16), dtype=np.uint8)
    blocks[0, 0, 0] = np.arange(16) * 17  # every nibble in both places
    scales = RNG.integers(100, 140, (N, 2 * F, 2), dtype=np.uint8)
    scales[1, 0] = [0, 254]
    expected = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float64)
    experts = f"{LAYER}mlp__experts__gate_up_proj"
    inner = Memory(**{f"{experts}_blocks": blocks, f"{experts}_scales": scales})
    store = ExpertStore(inner, transposed=True)
    assert set(store.entries) == {f"{MLP}experts.{i}.{part}_proj.weight" for i in range(N) for part in ("gate", "up")}
    for index in range(N):
        for place, part in enumerate(("gate", "up")):
            name = f"{MLP}experts.{index}.{part}_proj.weight"
            assert store.entries[name].shape == (F, 64)
            exact = expected[index].T[place::2].numpy()
            with np.errstate(over="ignore"):
                assert np.array_equal(values_of(store, name), exact.astype(np.float32))
    assert sum(entry.num_bytes for entry in store.entries.values()) == inner.num_bytes


@pytest.mark.clause("MD-EXPERT-4")
def test_mxfp4_scale_of_255_is_nan_and_shapes_must_fit() -> None:
    blocks = np.full((1, 1, 16), 0x11, dtype=np.uint8)
    found = mxfp4_as_bf16(blocks, np.array([[255]], dtype=np.uint8)).view(ml_dtypes.bfloat16)
    assert np.isnan(found.astype(np.float32)).all()
    with pytest.raises(ShapeError, match="MXFP4: blocks"):
        mxfp4_as_bf16(blocks, np.zeros((1, 2), dtype=np.uint8))


@pytest.mark.clause("MD-EXPERT-1", "MD-EXPERT-2", "MD-EXPERT-4")
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{LAYER}mlp__experts__gate_up_proj": number(N, 3, E)}, "gate_up_proj: got 3 rows, expected an even"),
        ({f"{LAYER}mlp__experts__down_proj": number(E, F)}, "down_proj: got shape [6, 4], expected 3 dimensions"),
        (
            {f"{LAYER}mlp__experts__down_proj_blocks": np.zeros((1, 2, 1, 16), np.uint8)},
            "down_proj_scales: got nothing, expected [1, 2, 1]",
        ),
        (
            {
                f"{LAYER}mlp__experts__down_proj": number(1, E, F),
                f"{LAYER}mlp__experts__0__down_proj__weight": number(E, F),
            },
            "got model.layers.1.mlp.experts.0.down_proj.weight a second time",
        ),
    ],
)
def test_what_cannot_be_taken_apart_is_named(tensors: Any, message: str) -> None:
    with pytest.raises(InvalidFormatError, match=re.escape(message)):
        ExpertStore(Memory(**tensors))


@pytest.mark.clause("LM-MOE-7")
def test_skipped_tensors_are_left_out() -> None:
    inner = Memory(model__layers__3__eh_proj__weight=number(2, 2), model__layers__2__x=number(2))
    store = ExpertStore(inner, skipped=re.compile(r"model\.layers\.3\..*"))
    assert list(store.entries) == ["model.layers.2.x"]
