"""What only a machine with an NVIDIA GPU can show; elsewhere these say why they are skipped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ferrum_torch import make_backend

from ferrum_ref.errors import DeviceError
from ferrum_ref.interfaces.kernel_ops import QuantScheme
from ferrum_ref.types.devices import DataType, Device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no usable NVIDIA GPU here")
RNG = np.random.default_rng(15)


@pytest.fixture
def gpu() -> Any:
    return make_backend("cuda")


@pytest.mark.clause("BK-TORCH-3")
def test_new_tensors_go_to_the_gpu_and_come_back(gpu: Any) -> None:
    x = gpu.tensor_factory().from_numpy(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert x.device() == Device.CUDA(0)
    assert x.to_cpu().device() == Device.CPU
    assert np.array_equal(x.to_numpy(), np.arange(6).reshape(2, 3))
    assert gpu.status().memory_usage[Device.CUDA(0)] > 0
    with pytest.raises(DeviceError, match="expected cuda:0 like the first operand"):
        gpu.tensor_ops().add(x, x.to_cpu())


@pytest.mark.clause("BK-TORCH-3", "BK-TORCH-15")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_operation_passes_the_judge(gpu: Any, dtype: str) -> None:
    from ferrum_ref.parity.runner import FAILED, Selection, run
    from ferrum_ref.parity.subject import BackendSubject

    results = run(BackendSubject(gpu, "torch", "cuda"), Selection(dtypes=(dtype,), only_small=True), None)
    assert [result.message for result in results if result.status == FAILED] == []


@pytest.mark.clause("BK-TORCH-16")
@pytest.mark.parametrize(("scheme", "block_bytes"), [(QuantScheme.Q4_0(32), 18), (QuantScheme.Q8_0(32), 34)])
def test_packed_weights_mean_the_same_as_on_the_cpu(gpu: Any, scheme: QuantScheme, block_bytes: int) -> None:
    packed = RNG.integers(0, 255, (40, 3 * block_bytes), dtype=np.uint8)
    packed.reshape(40, 3, block_bytes)[..., 1] = 0x2C  # scales between 2**-4 and 2**-3
    x = np.eye(96, dtype=np.float32)
    there, here = (
        backend.kernel_ops()
        .linear_ops()
        .quantized_linear(backend.tensor_factory().from_numpy(x), backend.tensor_factory().from_numpy(packed), scheme)
        for backend in (gpu, make_backend("cpu"))
    )
    assert np.array_equal(there.to_numpy(), here.to_numpy())


@pytest.mark.clause("BK-TORCH-18")
def test_a_seed_draws_the_same_token_as_on_the_cpu(gpu: Any) -> None:
    from ferrum_ref.interfaces.kernel_ops import KernelSamplingParams

    logits = RNG.normal(size=500).astype(np.float32)
    for seed in range(20):
        params = KernelSamplingParams(0.9, 50, 0.95, 1.1, [3, 4], [1, 2], seed)
        tokens = [
            backend.kernel_ops().sampling_ops().sample_token(backend.tensor_factory().from_numpy(logits), params)
            for backend in (gpu, make_backend("cpu"))
        ]
        assert tokens[0] == tokens[1]


@pytest.mark.clause("BK-TORCH-7")
def test_conversions_are_those_of_the_cpu(gpu: Any) -> None:
    values = np.array([2**25 + 2**17 + 1, -5, 0, 2**31 - 1], np.int32)
    for dtype in (DataType.BF16, DataType.FP16, DataType.FP8, DataType.UINT8, DataType.BOOL):
        there, here = (b.tensor_factory().from_numpy(values).to_dtype(dtype).to_numpy() for b in (gpu, make_backend()))
        assert np.array_equal(there.astype(np.float64), here.astype(np.float64))


@pytest.mark.clause("BK-TORCH-27")
def test_pairs_are_stacked_on_a_gpu(gpu: Any) -> None:
    factory, batch = gpu.tensor_factory(), gpu.tensor_batch_ops()
    lefts = [RNG.normal(size=(3, 40)).astype(np.float32) for _ in range(4)]
    rights = [RNG.normal(size=(40, 6)).astype(np.float32) for _ in range(4)]
    products = batch.batch_matmul(list(map(factory.from_numpy, lefts)), list(map(factory.from_numpy, rights)))
    assert len({product.data.untyped_storage().data_ptr() for product in products}) == 1
    for product, a, b in zip(products, lefts, rights, strict=True):
        bound = 40 * 2.0**-23 * (np.abs(a) @ np.abs(b)) * 1.001
        assert np.all(np.abs(product.to_numpy() - a.astype(np.float64) @ b) <= bound)


@pytest.mark.clause("BK-TORCH-30", "TN-ASYNC-1", "TN-ASYNC-2")
def test_awaited_operations_run_in_a_stream_of_their_own(gpu: Any) -> None:
    import asyncio

    factory = gpu.tensor_factory()
    a = factory.from_numpy(RNG.normal(size=(2048, 2048)).astype(np.float32))
    direct = gpu.tensor_ops().matmul(a, a).to_numpy()

    async def main() -> None:
        with gpu.async_tensor_ops() as ops:
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            counting = asyncio.create_task(count())
            tasks = [asyncio.create_task(ops.matmul_async(a, a)) for _ in range(20)]
            await ops.synchronize()
            assert all(task.done() for task in tasks) or await asyncio.gather(*tasks)
            counting.cancel()
            assert turns > 1
            for task in tasks:
                assert np.array_equal(task.result().to_numpy(), direct)

    asyncio.run(main())


@pytest.mark.clause("BK-TORCH-30")
def test_operands_may_be_dropped_and_what_the_callers_stream_had_is_waited_for(gpu: Any) -> None:
    import asyncio

    factory, ops = gpu.tensor_factory(), gpu.tensor_ops()

    async def main() -> None:
        with gpu.async_tensor_ops() as awaited:
            for _ in range(10):
                x = factory.from_numpy(np.ones((1024, 1024), np.float32))
                for _ in range(5):
                    x = ops.add(x, x)  # still running in the caller's stream when the product is started
                task = asyncio.create_task(awaited.matmul_async(x, x))
                await asyncio.sleep(0)
                del x
                scratch = [factory.from_numpy(np.zeros((1024, 1024), np.float32)) for _ in range(4)]
                assert float((await task).data.min()) == float((await task).data.max()) == 1024 * 32.0 * 32.0
                del scratch

    asyncio.run(main())


@pytest.mark.clause("BK-TORCH-34", "BK-TORCH-37")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_compiled_and_fused_forms_pass_the_judge(dtype: str) -> None:
    from ferrum_ref.parity.runner import FAILED, Selection, run
    from ferrum_ref.parity.subject import BackendSubject

    subject = BackendSubject(make_backend("cuda", compiled=True, sdpa=True), "torch", "cuda")
    results = run(subject, Selection(dtypes=(dtype,), only_small=True), None)
    assert [result.message for result in results if result.status == FAILED] == []
