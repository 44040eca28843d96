"""Operations over lists of tensors, against numpy and against one product after another."""

from __future__ import annotations

import asyncio
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from ferrum_cupy import linear
from ferrum_cupy import products as module
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.tensor import TensorBatchOps
from ferrum_ref.types.devices import DataType

RNG = np.random.default_rng(31)
BF16 = ml_dtypes.bfloat16
UNITS = {np.float32: 0.0, np.float16: 2.0**-11, BF16: 2.0**-8}


@pytest.fixture
def batch(host: Any) -> Any:
    return host.tensor_batch_ops()


@pytest.fixture
def tensor(host: Any) -> Any:
    return lambda values, dtype=np.float32: host.tensor_factory().from_numpy(np.array(values).astype(dtype))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """The shapes of every product that is asked for."""
    seen: list[tuple[Any, Any]] = []
    really = linear.matmul

    def counted(runtime: Any, a: Any, b: Any) -> Any:
        seen.append((a.shape(), b.shape()))
        return really(runtime, a, b)

    monkeypatch.setattr(linear, "matmul", counted)
    return seen


@pytest.mark.clause("BK-CUPY-47", "TN-BATCH-1")
def test_products_of_pairs(batch: Any, tensor: Any) -> None:
    assert isinstance(batch, TensorBatchOps)
    a, b = [tensor([[1, 2]]), tensor([[1], [2]])], [tensor([[3], [4]]), tensor([[3, 4]])]
    assert [t.to_numpy().tolist() for t in batch.batch_matmul(a, b)] == [[[11]], [[3, 4], [6, 8]]]
    assert batch.batch_matmul([], []) == []
    with pytest.raises(InvalidParameterError, match="2 tensors in a_batch and 1 in b_batch"):
        batch.batch_matmul(a, b[:1])
    with pytest.raises(BackendError, match="pair 1: matmul: inner dimensions"):
        batch.batch_matmul(a, [b[0], tensor([[1], [2]])])
    with pytest.raises(BackendError, match="pair 0: matmul: a: element type INT32"):
        batch.batch_matmul([tensor([[1]], np.int32)], [tensor([[1]], np.int32)])
    with pytest.raises(BackendError, match="pair 1: matmul: b: got ndarray"):
        batch.batch_matmul(a, [b[0], np.ones((1, 1))])


@pytest.mark.clause("BK-CUPY-47")
def test_every_pair_is_checked_before_the_first_is_multiplied(batch: Any, tensor: Any, calls: list[Any]) -> None:
    with pytest.raises(BackendError, match="pair 1"):
        batch.batch_matmul([tensor([[1]]), tensor([[1]])], [tensor([[1]]), tensor([[1], [2]])])
    assert calls == []


def close(product: Any, a: Any, b: Any) -> bool:
    """Within the bound of float32 sums of the stored numbers, rounded once."""
    wide = [np.asarray(array).astype(np.float64) for array in (a, b)]
    exact, terms = wide[0] @ wide[1], np.abs(wide[0]) @ np.abs(wide[1])
    found = product.to_numpy()
    unit = next(unit for kind, unit in UNITS.items() if found.dtype == kind)
    error = np.abs(found.astype(np.float64) - exact)
    bound = (a.shape[-1] * 2.0**-24 + unit) * terms * 1.001 + 2.0**-25
    return found.shape == exact.shape and bool(np.all(error <= bound))


@pytest.mark.clause("BK-CUPY-47")
def test_one_matrix_for_several_pairs_is_one_product(batch: Any, tensor: Any, calls: list[Any]) -> None:
    lefts = [RNG.normal(size=shape).astype(np.float32) for shape in ((3, 40), (2, 5, 40), (0, 40))]
    w = tensor(RNG.normal(size=(40, 6)))
    got = batch.batch_matmul([tensor(a) for a in lefts], [w] * 3)
    assert calls == [((13, 40), (40, 6))]
    assert all(close(product, a, w.to_numpy()) for product, a in zip(got, lefts, strict=True))


@pytest.mark.clause("BK-CUPY-47", "BK-CUPY-52")
@pytest.mark.parametrize(
    "shapes",
    [
        [((3, 7), (7, 5))] * 3 + [((1, 7), (7, 5))] * 2,
        [((2, 3, 16), (16, 4)), ((2, 3, 16), (16, 4)), ((3, 16), (2, 16, 4)), ((3, 16), (2, 16, 4))],
        [((2, 0), (0, 3)), ((2, 0), (0, 3)), ((0, 3), (3, 2)), ((0, 3), (3, 2))],
        [((4, 1, 2, 8), (3, 8, 5)), ((4, 1, 2, 8), (3, 8, 5)), ((0, 2, 8), (1, 8, 5))],
    ],
)
@pytest.mark.parametrize("dtype", list(UNITS))
@pytest.mark.parametrize("most", [-1, module.ELEMENTS_WORTH_COPYING])
def test_pairs_that_are_stacked_give_what_single_ones_give(
    batch: Any, tensor: Any, calls: list[Any], monkeypatch: Any, shapes: Any, dtype: Any, most: int
) -> None:
    monkeypatch.setattr(module, "ELEMENTS_WORTH_COPYING", most)
    pairs = [(RNG.normal(size=a).astype(dtype), RNG.normal(size=b).astype(dtype)) for a, b in shapes]
    got = batch.batch_matmul([tensor(a, dtype) for a, _ in pairs], [tensor(b, dtype) for _, b in pairs])
    assert len(calls) == (len(set(shapes)) if most > 0 else len(shapes))
    for product, (a, b) in zip(got, pairs, strict=True):
        assert product.to_numpy().dtype == dtype
        assert close(product, a, b)


@pytest.mark.clause("BK-CUPY-47", "TN-BATCH-1")
def test_results_come_in_the_order_of_the_pairs(batch: Any, tensor: Any, calls: list[Any]) -> None:
    """Two matrices taking turns: the calls are two, the results four. Large pairs are not copied together."""
    v, w = tensor([[1.0], [0.0]]), tensor([[0.0], [1.0]])
    lefts = [tensor([[10.0 * index + 1, 10.0 * index + 2]]) for index in range(4)]
    products = batch.batch_matmul(lefts, [v, w, v, w])
    assert [product.to_numpy().item() for product in products] == [1, 12, 21, 32]
    assert len(calls) == 2
    large = [tensor(np.zeros((600, 600))) for _ in range(2)]
    batch.batch_matmul([tensor(np.ones((1, 600)))] * 2, large)
    assert len(calls) == 4


@pytest.mark.clause("BK-CUPY-48", "TN-BATCH-2", "TN-BATCH-3")
@given(data=st.data())
def test_stack_and_unstack(data: st.DataObject) -> None:
    from ferrum_cupy.host import make_backend

    backend: Any = make_backend()
    batch, factory = backend.tensor_batch_ops(), backend.tensor_factory()
    shape = data.draw(arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    count, dim = data.draw(st.integers(1, 4)), data.draw(st.integers(0, len(shape)))
    sources = [data.draw(arrays.arrays(np.int16, shape)) for _ in range(count)]
    stacked = batch.stack([factory.from_numpy(source) for source in sources], dim)
    assert np.array_equal(stacked.to_numpy(), np.stack(sources, dim))
    assert stacked.dtype() is DataType.INT16
    pieces = batch.unstack(stacked, dim)
    assert all(np.array_equal(piece.to_numpy(), source) for piece, source in zip(pieces, sources, strict=True))
    assert all(piece.shape() == shape for piece in pieces)


@pytest.mark.clause("BK-CUPY-48", "TN-BATCH-2", "TN-BATCH-3")
def test_stack_limits(batch: Any, host: Any, tensor: Any) -> None:
    a, b = tensor([1, 2]), tensor([3, 4], np.float16)
    assert batch.stack([tensor([1, 2], np.float16), tensor([3, 4], BF16)], 1).dtype() is DataType.FP32
    assert batch.stack([b, a], 0).to_numpy().tolist() == [[3, 4], [1, 2]]
    assert batch.stack([tensor([1.5, -2], BF16)] * 2, 1).to_numpy().tolist() == [[1.5, 1.5], [-2, -2]]
    assert all(np.shares_memory(piece.array, a.array) for piece in batch.unstack(a, 0))
    frozen = np.ones(2, np.float32)
    frozen.flags.writeable = False
    assert all(piece.is_read_only for piece in batch.unstack(host.tensor_factory().from_numpy(frozen), 0))
    for arguments in (([], 0), ([a], 2), ([a], -1), ([a, tensor([1])], 0)):
        with pytest.raises(BackendError, match="stack"):
            batch.stack(*arguments)
    for dim in (1, -1):
        with pytest.raises(ShapeError, match=r"unstack: axis -?1 of shape \(2,\)"):
            batch.unstack(a, dim)
    with pytest.raises(BackendError, match="tensor 1: got ndarray"):
        batch.stack([a, np.ones(2)], 0)


@pytest.mark.clause("BK-CUPY-49", "TN-BATCH-4")
@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, BF16, ml_dtypes.float8_e4m3fn, np.int32, np.uint16, np.uint32, np.bool_]
)
def test_pad_batch(batch: Any, tensor: Any, dtype: Any) -> None:
    a, b, c = tensor([[1, 1]], dtype), tensor(np.ones((2, 3)), dtype), tensor([[2.5]])
    padded = batch.pad_batch([a, c, b], (2, 3))
    assert [t.to_vec_f32().tolist() for t in padded] == [[1, 1, 0, 0, 0, 0], [2.5, 0, 0, 0, 0, 0], [1] * 6]
    assert [t.dtype() for t in padded] == [a.dtype(), DataType.FP32, a.dtype()]
    assert not np.shares_memory(padded[2].array, b.array)
    assert not np.shares_memory(padded[2].array, padded[0].array)
    assert batch.pad_batch([], (2, 3)) == []
    for target in ((2, 2), (6,), (2, 3, 1)):
        with pytest.raises(ShapeError, match=r"pad_batch: tensor [02] has shape"):
            batch.pad_batch([a, a, b], target)
    assert batch.pad_batch([tensor(np.ones(0), dtype)], (2,))[0].to_vec_f32().tolist() == [0, 0]
    assert batch.pad_batch([tensor(1, dtype)], ())[0].to_vec_f32().tolist() == [1]


@pytest.mark.clause("BK-CUPY-12", "BK-CUPY-47", "BK-CUPY-50")
def test_after_shutdown(host: Any) -> None:
    from ferrum_cupy.host import make_backend

    backend: Any = make_backend()
    batch, x = backend.tensor_batch_ops(), backend.tensor_factory().from_numpy(np.ones((1, 1), np.float32))
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


@pytest.mark.clause("BK-CUPY-47", "TN-BATCH-1")
def test_pairs_of_other_types_are_not_stacked(batch: Any, tensor: Any, calls: list[Any]) -> None:
    """Equal shapes, two types: each result in its own type, 16-bit numbers beyond FP16's range among them."""
    given = [(np.float32, 1e30), (BF16, 2.0**100), (np.float16, 3.0), (np.float32, 2.0)]
    found = batch.batch_matmul(
        [tensor([[value]], dtype) for dtype, value in given], [tensor([[1]], dtype) for dtype, _ in given]
    )
    assert [each.dtype() for each in found] == [DataType.FP32, DataType.BF16, DataType.FP16, DataType.FP32]
    assert [float(each.to_numpy().item()) for each in found] == [np.float32(1e30), 2.0**100, 3.0, 2.0]
    assert len(calls) == 3
