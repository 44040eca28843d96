"""The numpy backend's fused operations: each one is its kernel, and the defects of upstream are absent on this path."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ferrum_ref.errors import BackendError, InvalidParameterError
from ferrum_ref.interfaces.kernel_ops import AttentionParams, KernelSamplingParams
from ferrum_ref.kernels import activation, attention, linear, norm, rope
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.types.algorithm import Algorithm
from ferrum_ref.types.devices import DataType

BACKEND = make_backend()
OPS = BACKEND.kernel_ops()


def tensor(values, dtype=DataType.FP32):
    return BACKEND.tensor_factory().from_numpy(np.array(values, np.float32)).to_dtype(dtype)


@pytest.mark.clause("BK-NUMPY-2", "BK-NUMPY-3")
@pytest.mark.parametrize("dtype", [DataType.FP32, DataType.FP16, DataType.BF16, DataType.FP8])
def test_each_operation_is_its_kernel(dtype):
    rng = np.random.default_rng(0)
    x, y, w = (tensor(rng.standard_normal(s), dtype) for s in ((2, 3, 4, 8), (2, 3, 4, 8), (8,)))
    k, v = (tensor(rng.standard_normal((2, 5, 2, 8)), dtype) for _ in range(2))
    cos, sin = (tensor(rng.standard_normal((6, 4)), dtype) for _ in range(2))
    matrix = tensor(rng.standard_normal((5, 8)), dtype)
    params = AttentionParams(4, 2, 8, 0.3, True, 3)
    arrays = {id(t): t.to_numpy() for t in (x, y, w, k, v, cos, sin, matrix)}

    def a(t):
        return arrays[id(t)]

    pairs = [
        (OPS.norm_ops().rms_norm(x, w, 1e-5), norm.rms_norm(a(x), a(w), 1e-5)),
        (OPS.norm_ops().rms_norm_residual(x, y, w, 1e-5)[0], norm.rms_norm_residual(a(x), a(y), a(w), 1e-5)[0]),
        (OPS.norm_ops().rms_norm_residual(x, y, w, 1e-5)[1], norm.rms_norm_residual(a(x), a(y), a(w), 1e-5)[1]),
        (
            OPS.position_ops().rotary_embedding(x, cos, sin, [5, 0, 2]),
            rope.rotary_embedding(a(x), a(cos), a(sin), [5, 0, 2]),
        ),
        (OPS.attention_ops().attention(x, k, v, params), attention.attention(a(x), a(k), a(v), 0.3, True, 3)),
        (OPS.activation_ops().silu_mul(x, y), activation.silu_mul(a(x), a(y))),
        (OPS.activation_ops().gelu(x), activation.gelu(a(x))),
        (OPS.linear_ops().linear(x, matrix), linear.linear(a(x), a(matrix))),
        (OPS.linear_ops().embedding(matrix, [4, 0]), a(matrix)[[4, 0]]),
    ]
    table = np.array([[0], [1]])
    paged = OPS.attention_ops().paged_attention(x, k, v, table, params, context_lens=[4, 3])
    pairs.append((paged, attention.paged_attention(a(x), a(k), a(v), table, [4, 3], 0.3, True, 3)))
    for ours, kernel in pairs:
        assert ours.dtype() is dtype
        assert ours.to_numpy().tobytes() == np.ascontiguousarray(kernel).tobytes()
    assert OPS.backend_name() == "numpy"


@pytest.mark.clause("BK-NUMPY-3")
def test_the_declared_algorithm():
    for op in (
        "rms_norm",
        "rms_norm_residual",
        "attention",
        "paged_attention",
        "linear",
        "silu_mul",
        "rotary_embedding",
    ):
        assert OPS.declared_algorithm(op) == Algorithm()
    assert OPS.declared_algorithm("gelu") == Algorithm(accumulate="fp64")


@pytest.mark.clause("KN-WRITEKV-1", "KN-PAGED-1", "BK-NUMPY-2")
def test_writing_and_reading_a_paged_cache():
    factory = BACKEND.tensor_factory()
    k_cache, v_cache = (
        factory.zeros((4, 2, 1, 1), DataType.BF16, BACKEND.capabilities().supported_devices[0]) for _ in range(2)
    )
    part = OPS.attention_ops()
    for t, slot in enumerate((6, 7, 2)):  # block 3, then block 1
        part.write_kv(v_cache, tensor([[[float(t + 1)]]], DataType.BF16), [slot])
    part.write_kv(k_cache, tensor([[[0.0]], [[math.log(2)]]], DataType.BF16), [7, 2])
    q, params = tensor([[[1.0]]], DataType.BF16), AttentionParams(1, 1, 1, 0.0, True)
    out = part.paged_attention(q, k_cache, v_cache, np.array([[3, 1]]), params, context_lens=[3])
    assert out.to_vec_f32().tolist() == [2]
    flat = part.paged_attention(q, k_cache, v_cache, [3], params)
    assert flat.to_vec_f32().tolist() == [1.5]


@pytest.mark.clause("KN-ATTN-4", "BK-NUMPY-2")
def test_the_scale_of_the_parameters_is_used():
    q, k, v = tensor([[[[1.0]]]]), tensor([[[[0.0]], [[math.log(3)]]]]), tensor([[[[0.0]], [[4.0]]]])
    for scale, expected in ((1.0, 3.0), (0.0, 2.0)):  # upstream: 3 for both (D-52)
        out = OPS.attention_ops().attention(q, k, v, AttentionParams(1, 1, 1, scale, False))
        assert out.to_vec_f32()[0] == pytest.approx(expected, rel=8 * 2**-24)


@pytest.mark.clause("BK-NUMPY-5")
def test_heads_must_be_those_of_the_parameters():
    q, k = tensor(np.ones((1, 2, 4, 8))), tensor(np.ones((1, 2, 2, 8)))
    for wrong in ((4, 4, 8), (8, 2, 8), (4, 2, 4)):
        params = AttentionParams(*wrong, 1.0, True)
        with pytest.raises(BackendError, match="as the parameters say"):
            OPS.attention_ops().attention(q, k, k, params)
        with pytest.raises(BackendError, match="as the parameters say"):
            OPS.attention_ops().paged_attention(q, k, k, [0], params)


@pytest.mark.clause("KN-SAMPLE-1", "KN-ARGMAX-1", "KN-SAMPLE-8")
def test_sampling():
    part = OPS.sampling_ops()
    logits = tensor([[math.log(1), math.log(3)]])
    assert part.argmax(tensor([1, 3, 3])) == 1
    drawn = [part.sample_token(logits, KernelSamplingParams(1.0, 0, 1.0, 1.0, [], [], seed)) for seed in range(2000)]
    assert abs(sum(drawn) - 1500) < 6 * math.sqrt(2000 * 0.1875)  # upstream: the argmax, 2000 times (D-18)
    assert part.sample_token(logits, KernelSamplingParams(1.0, 0, 1.0, 1e6, [1], [1], 0)) == 0
    with pytest.raises(InvalidParameterError, match="temperature"):
        part.sample_token(logits, KernelSamplingParams(-1.0, 0, 1.0, 1.0, [], [], 0))


@pytest.mark.clause("KN-EMBED-2", "KN-ROPE-3")
def test_out_of_range():
    with pytest.raises(InvalidParameterError, match="id 2"):
        OPS.linear_ops().embedding(tensor([[1.0], [2.0]]), [2])
    table = tensor([[1.0]])
    with pytest.raises(InvalidParameterError, match="position 1"):
        OPS.position_ops().rotary_embedding(tensor([[[[1.0, 2.0]]]]), table, table, [1])


@pytest.mark.clause("BK-NUMPY-4")
def test_foreign_tensors():
    class Foreign:
        def ndim(self):
            return 1

    x = tensor([1.0])
    for call in (
        lambda: OPS.linear_ops().linear(x, Foreign()),
        lambda: OPS.norm_ops().rms_norm(Foreign(), x, 0.0),
        lambda: BACKEND.tensor_ops().add(x, Foreign()),
        lambda: BACKEND.tensor_factory().zeros_like(Foreign()),
    ):
        with pytest.raises(BackendError, match="expected a NumpyTensor"):
            call()
