"""Operations over lists of tensors, against numpy and against one product after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from ferrum_torch import linear
from ferrum_torch import products as module
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ferrum_ref.errors import BackendError, DeviceError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.tensor import TensorBatchOps
from ferrum_ref.types.devices import DataType

RNG = np.random.default_rng(31)
BF16 = ml_dtypes.bfloat16


@pytest.fixture
def batch(backend: Any) -> Any:
    return backend.tensor_batch_ops()


def gaussian(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.normal(size=shape).astype(np.float32))


@pytest.mark.clause("BK-TORCH-26", "TN-BATCH-1")
def test_products_of_pairs(batch: Any, tensor: Any) -> None:
    assert isinstance(batch, TensorBatchOps)
    a, b = [tensor([[1, 2]]), tensor([[1], [2]])], [tensor([[3], [4]]), tensor([[3, 4]])]
    assert [t.to_numpy().tolist() for t in batch.batch_matmul(a, b)] == [[[11]], [[3, 4], [6, 8]]]
    assert batch.batch_matmul([], []) == []
    with pytest.raises(InvalidParameterError, match="2 tensors in a_batch and 1 in b_batch"):
        batch.batch_matmul(a, b[:1])
    with pytest.raises(BackendError, match="pair 1: matmul: inner dimensions"):
        batch.batch_matmul(a, [b[0], tensor([[1], [2]])])
    with pytest.raises(BackendError, match="pair 0: matmul: element type int32"):
        batch.batch_matmul([tensor([[1]], np.int32)], [tensor([[1]], np.int32)])
    with pytest.raises(BackendError, match="pair 1: matmul: b: got ndarray"):
        batch.batch_matmul(a, [b[0], np.ones((1, 1))])


@pytest.mark.clause("BK-TORCH-27")
def test_every_pair_is_checked_before_the_first_is_multiplied(
    batch: Any, tensor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(linear, "matmul", lambda *operands: calls.append(operands))
    with pytest.raises(BackendError, match="pair 1"):
        batch.batch_matmul([tensor([[1]]), tensor([[1]])], [tensor([[1]]), tensor([[1], [2]])])
    assert calls == []


@pytest.mark.clause("BK-TORCH-27")
def test_one_matrix_for_several_pairs_is_one_product(batch: Any, factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lefts, w = [RNG.normal(size=shape).astype(np.float32) for shape in ((3, 40), (2, 5, 40), (0, 40))], None
    w = factory.from_numpy(RNG.normal(size=(40, 6)).astype(np.float32))
    rows: list[int] = []
    really = linear.matmul

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        rows.append(a.shape[0])
        return really(a, b)

    monkeypatch.setattr(linear, "matmul", counted)
    got = batch.batch_matmul([factory.from_numpy(a) for a in lefts], [w] * 3)
    assert rows == [13]
    for product, a in zip(got, lefts, strict=True):
        exact = a.astype(np.float64) @ w.to_numpy().astype(np.float64)
        bound = 40 * 2.0**-24 * (np.abs(a) @ np.abs(w.to_numpy())).astype(np.float64)
        assert product.shape() == exact.shape
        assert np.all(np.abs(product.to_numpy() - exact) <= bound * (1 + 40 * 2.0**-24))


@pytest.mark.clause("BK-TORCH-27")
@pytest.mark.parametrize("most", [0, 10**6])
@pytest.mark.parametrize(
    "shapes",
    [
        [((3, 7), (7, 5))] * 3 + [((1, 7), (7, 5))] * 2,
        [((2, 3, 16), (16, 4)), ((2, 3, 16), (16, 4)), ((3, 16), (2, 16, 4)), ((3, 16), (2, 16, 4))],
        [((2, 0), (0, 3)), ((2, 0), (0, 3)), ((0, 3), (3, 2)), ((0, 3), (3, 2))],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pairs_that_are_stacked_give_what_single_ones_give(
    shapes: list[Any], most: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`most`: how large a pair may be to be stacked; on a CPU it never is, a GPU's limit is tried here."""
    monkeypatch.setattr(module, "CPU_ELEMENTS_WORTH_COPYING", most)
    pairs = [(gaussian(*a).to(dtype), gaussian(*b).to(dtype)) for a, b in shapes]
    if most:
        assert len(module.groups(pairs)) == len({(a, b) for a, b in shapes})
    for product, (a, b) in zip(module.products(pairs), pairs, strict=True):
        exact = a.double() @ b.double()
        terms, unit = a.shape[-1], {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
        bound = (terms * 2.0**-24 + unit) * (a.double().abs() @ b.double().abs())
        assert product.dtype is dtype
        assert product.shape == exact.shape
        assert torch.all((product.double() - exact).abs() <= bound * 1.001 + 2.0**-25)


@pytest.mark.clause("BK-TORCH-27", "TN-BATCH-1")
def test_results_come_in_the_order_of_the_pairs(batch: Any, tensor: Any) -> None:
    """Two matrices taking turns: the calls are two, the results four."""
    v, w = tensor([[1.0], [0.0]]), tensor([[0.0], [1.0]])
    lefts = [tensor([[10.0 * index + 1, 10.0 * index + 2]]) for index in range(4)]
    products = batch.batch_matmul(lefts, [v, w, v, w])
    assert [product.to_numpy().item() for product in products] == [1, 12, 21, 32]


@pytest.mark.clause("BK-TORCH-27")
def test_only_what_a_gpu_gains_from_is_stacked() -> None:
    small, large = (gaussian(2, 3), gaussian(3, 2)), (gaussian(2, 600), gaussian(600, 600))
    assert module.groups([small, large, (small[0], gaussian(3, 2))]) == [[0], [1], [2]]  # this is a CPU
    assert large[1].numel() > module.GPU_ELEMENTS_WORTH_COPYING >= small[1].numel()


@pytest.mark.clause("BK-TORCH-28", "TN-BATCH-2", "TN-BATCH-3")
@given(data=st.data())
def test_stack_and_unstack(data: st.DataObject) -> None:
    from ferrum_torch import make_backend

    backend = make_backend()
    batch, factory = backend.tensor_batch_ops(), backend.tensor_factory()  # type: ignore[attr-defined]
    shape = data.draw(arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    count, dim = data.draw(st.integers(1, 4)), data.draw(st.integers(0, len(shape)))
    sources = [data.draw(arrays.arrays(np.int16, shape)) for _ in range(count)]
    stacked = batch.stack([factory.from_numpy(source) for source in sources], dim)
    assert np.array_equal(stacked.to_numpy(), np.stack(sources, dim))
    assert stacked.dtype() is DataType.INT16
    pieces = batch.unstack(stacked, dim)
    assert all(np.array_equal(piece.to_numpy(), source) for piece, source in zip(pieces, sources, strict=True))
    assert all(piece.shape() == shape for piece in pieces)


@pytest.mark.clause("BK-TORCH-28", "TN-BATCH-2", "TN-BATCH-3")
def test_stack_limits(batch: Any, factory: Any, tensor: Any) -> None:
    a, b = tensor([1, 2]), tensor([3, 4], np.float16)
    assert batch.stack([tensor([1, 2], np.float16), tensor([3, 4], BF16)], 1).dtype() is DataType.FP32
    assert batch.stack([b, a], 0).dtype() is DataType.FP32
    pieces = batch.unstack(a, 0)
    assert all(np.shares_memory(piece.to_numpy(), a.to_numpy()) for piece in pieces)
    frozen = np.ones(2, np.float32)
    frozen.flags.writeable = False
    assert all(piece.is_read_only for piece in batch.unstack(factory.from_numpy(frozen), 0))
    for arguments in (([], 0), ([a], 2), ([a], -1), ([a, tensor([1])], 0)):
        with pytest.raises(BackendError, match="stack"):
            batch.stack(*arguments)
    for dim in (1, -1):
        with pytest.raises(ShapeError, match=r"unstack: axis -?1 of shape \(2,\)"):
            batch.unstack(a, dim)
    with pytest.raises(BackendError, match="tensor 1: got ndarray"):
        batch.stack([a, np.ones(2)], 0)


@pytest.mark.clause("BK-TORCH-28", "TN-BATCH-4")
@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, BF16, ml_dtypes.float8_e4m3fn, np.int32, np.uint16, np.uint32, np.bool_]
)
def test_pad_batch(batch: Any, tensor: Any, dtype: Any) -> None:
    a, b, c = tensor([[1, 1]], dtype), tensor(np.ones((2, 3)), dtype), tensor([[2.5]])
    padded = batch.pad_batch([a, c, b], (2, 3))
    assert [t.to_vec_f32().tolist() for t in padded] == [[1, 1, 0, 0, 0, 0], [2.5, 0, 0, 0, 0, 0], [1] * 6]
    assert [t.dtype() for t in padded] == [a.dtype(), DataType.FP32, a.dtype()]
    assert not np.shares_memory(padded[2].to_numpy(), b.to_numpy())
    assert not np.shares_memory(padded[2].to_numpy(), padded[0].to_numpy())
    assert batch.pad_batch([], (2, 3)) == []
    for target in ((2, 2), (6,), (2, 3, 1)):
        with pytest.raises(ShapeError, match=r"pad_batch: tensor [02] has shape"):
            batch.pad_batch([a, a, b], target)
    assert batch.pad_batch([tensor(np.ones(0), dtype)], (2,))[0].to_vec_f32().tolist() == [0, 0]
    assert batch.pad_batch([tensor(1, dtype)], ())[0].to_vec_f32().tolist() == [1]


@pytest.mark.clause("BK-TORCH-26", "BK-TORCH-28")
def test_devices_and_shutdown(backend: Any, batch: Any, tensor: Any) -> None:
    import asyncio

    from ferrum_torch.tensor import TorchTensor

    elsewhere: Callable[..., Any] = lambda *shape: TorchTensor(torch.ones(shape, device="meta"))  # noqa: E731
    with pytest.raises(DeviceError, match="tensor 1: is on meta"):
        batch.stack([tensor([1.0]), elsewhere(1)], 0)
    with pytest.raises(DeviceError, match="pair 0: matmul: b: is on meta"):
        batch.batch_matmul([tensor([[1.0]])], [elsewhere(1, 1)])
    x = tensor([[1.0]])
    asyncio.run(backend.shutdown())
    for call in (
        lambda: batch.batch_matmul([x], [x]),
        lambda: batch.stack([x], 0),
        lambda: batch.unstack(x, 0),
        lambda: batch.pad_batch([x], (2, 2)),
        backend.tensor_batch_ops,
        backend.async_tensor_ops,
    ):
        with pytest.raises(BackendError, match="shut down"):
            call()
