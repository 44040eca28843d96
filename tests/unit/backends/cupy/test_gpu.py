"""What only a machine with an NVIDIA GPU can show; elsewhere these say why they are skipped."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.memory import MemoryTransfer
from ferrum_ref.types.devices import DataType

RNG = np.random.default_rng(17)
KINDS = {DataType.FP32: 0.0, DataType.FP16: 2.0**-11, DataType.BF16: 2.0**-8}


@pytest.fixture(scope="module")
def gpu() -> Any:
    from ferrum_cupy import make_backend

    try:
        return make_backend("cuda")
    except UnsupportedError as error:
        pytest.skip(error.message)


def tensor(gpu: Any, *shape: int, kind: DataType = DataType.FP32) -> Any:
    return gpu.tensor_factory().from_numpy(RNG.standard_normal(shape, np.float32)).to_dtype(kind)


def close(product: Any, a: Any, b: Any) -> bool:
    """Within float32 sums of the stored numbers, cut where they should be rounded, and one rounding."""
    wide = [each.to_numpy().astype(np.float64) for each in (a, b)]
    exact, terms = wide[0] @ wide[1], np.abs(wide[0]) @ np.abs(wide[1])
    bound = (2 * wide[0].shape[-1] * 2.0**-23 + KINDS[a.dtype()]) * terms * 1.001
    return bool(np.all(np.abs(product.to_numpy().astype(np.float64) - exact) <= bound))


@pytest.mark.clause("BK-CUPY-52", "BK-CUPY-47")
@pytest.mark.parametrize("kind", list(KINDS))
def test_products_of_matrices_as_they_lie(gpu: Any, kind: DataType) -> None:
    ops, batch = gpu.tensor_ops(), gpu.tensor_batch_ops()
    q, k, w = tensor(gpu, 4, 7, 72, kind=kind), tensor(gpu, 4, 9, 72, kind=kind), tensor(gpu, 72, 13, kind=kind)
    turned = ops.transpose(k, 1, 2)
    assert close(ops.matmul(q, turned), q, turned)
    assert close(ops.matmul(q, w), q, w)
    one = tensor(gpu, 1, 72, 5, kind=kind)
    assert close(ops.matmul(q, one), q, one)
    pairs = [(tensor(gpu, 3, 40, kind=kind), tensor(gpu, 40, 6, kind=kind)) for _ in range(5)]
    found = batch.batch_matmul([a for a, _ in pairs] + [q, q], [b for _, b in pairs] + [w, w])
    assert all(close(each, a, b) for each, (a, b) in zip(found, [*pairs, (q, w), (q, w)], strict=True))


@pytest.mark.clause("BK-CUPY-50", "BK-CUPY-51")
def test_awaited_operations(gpu: Any) -> None:
    """Many in flight, their operands dropped at once, in the default stream and in another."""
    import cupy

    async def main(ops: Any) -> None:
        for stream in (cupy.cuda.Stream.null, cupy.cuda.Stream(non_blocking=True)):
            with stream:
                given = [(tensor(gpu, 64, 300), tensor(gpu, 300, 50)) for _ in range(30)]
                kept = [tuple(gpu.tensor_factory().from_numpy(each.to_numpy()) for each in pair) for pair in given]
                tasks = [asyncio.create_task(ops.matmul_async(a, b)) for a, b in given]
                await asyncio.sleep(0)
                del given
                found = await asyncio.gather(*tasks)
                await ops.synchronize()
                assert all(close(each, *pair) for each, pair in zip(found, kept, strict=True))

    with gpu.async_tensor_ops() as ops:
        asyncio.run(main(ops))


@pytest.mark.clause("BK-CUPY-53")
def test_integers_that_were_sent_are_there_in_every_stream(gpu: Any) -> None:
    import cupy

    table = tensor(gpu, 50, 8)
    for number in range(40):
        ids = RNG.integers(0, 50, 5)
        for stream in (cupy.cuda.Stream.null, cupy.cuda.Stream(non_blocking=True)):
            with stream:
                found = gpu.kernel_ops().linear_ops().embedding(table, ids).to_numpy()
                assert np.array_equal(found, table.to_numpy()[ids]), number


@pytest.mark.clause("BK-CUPY-41")
def test_subnormal_numbers_are_numbers(gpu: Any) -> None:
    least = gpu.tensor_factory().from_numpy(np.full(8, 2.0**-149, np.float32))
    assert gpu.tensor_ops().add(least, least).to_numpy().tolist() == [2.0**-148] * 8


@pytest.mark.clause("BK-CUPY-17", "BK-CUPY-19", "BK-CUPY-45")
@pytest.mark.parametrize("kind", [DataType.FP32, DataType.BF16])
def test_a_graph_gives_what_launches_give(
    gpu: Any, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch, kind: DataType
) -> None:
    """Over a capacity that grows, two sequences in turn, memory taken and given back in between."""
    from ferrum_ref.models.decoder import Decoder
    from ferrum_ref.models.decoder_weights import read_decoder_weights
    from ferrum_ref.models.transformer_weights import DecoderTransformerWeights

    monkeypatch.setattr("ferrum_cupy.decode.FIRST_CAPACITY_TOKENS", 16)
    tiny = tiny_llama(7)
    decoder = Decoder(tiny.config, read_decoder_weights(tiny, gpu, kind), gpu)
    weights = DecoderTransformerWeights.of_decoder(decoder)
    config = weights.config()
    empty = gpu.tensor_factory().zeros(
        (0, config.num_kv_heads, config.head_dim), kind, gpu.capabilities().supported_devices[0]
    )
    found = []
    for use_graphs in (False, True):
        decode = gpu.make_decode_backend(weights, use_graphs=use_graphs)
        for key in "ab":
            decode.init_kv_cache(key, [(empty, empty)] * config.num_layers, 0)
        rows = []
        for position, token in enumerate(np.random.default_rng(5).integers(0, 97, 40).tolist()):
            rows += [decode.decode_step((token + shift) % 97, position, key) for key, shift in (("a", 0), ("b", 3))]
            tensor(gpu, 64, 64)
        found.append(np.concatenate([row.to_numpy()[0] for row in rows]))
    assert np.array_equal(*found)


@pytest.mark.clause("BK-CUPY-27", "BK-CUPY-28")
def test_copies_run_in_their_streams(gpu: Any) -> None:
    manager, size, (device,) = gpu.memory_manager(), 1 << 20, gpu.capabilities().supported_devices
    data = RNG.integers(0, 256, size, np.uint8).tobytes()

    async def main() -> bytes:
        first, second = [await manager.allocate(size, device) for _ in range(2)]
        stream = await manager.streams.create_stream(device)
        manager.write(first, data)
        await manager.copy_async(MemoryTransfer.new(first, second, size), stream)
        await manager.streams.synchronize_stream(stream)
        held = bytes(manager.read(second))
        for each in (first, second):
            await manager.deallocate(each)
        return held

    assert asyncio.run(main()) == data
