"""Parameters, default bodies and the dispatcher."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ferrum_ref.errors import BackendError, InvalidParameterError, UnsupportedError
from ferrum_ref.interfaces import kernel_ops
from ferrum_ref.interfaces.kernel_ops import (
    AttentionOps,
    AttentionParams,
    KernelOps,
    KernelOpsDispatch,
    KernelSamplingParams,
    LinearOps,
    NormOps,
    QuantScheme,
    RoPEConfig,
)
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.types.algorithm import Algorithm

BACKEND = make_backend()
OPS = BACKEND.tensor_ops()


def tensor(*values, dtype=np.float32):
    return BACKEND.tensor_factory().from_numpy(np.array(values, dtype))


class Nothing(KernelOps):
    def backend_name(self):
        return "nothing"


class NormOnly(Nothing):
    """A part that has the norm and leaves everything else to the default bodies."""

    class Part(NormOps):
        def rms_norm(self, input, weight, eps):
            return BACKEND.tensor_ops().rms_norm(input, weight, eps)

    def norm_ops(self):
        return self.Part()


@pytest.mark.clause("KN-PARAMS-1")
def test_rope_config():
    assert RoPEConfig(64, 2048, 10000.0).head_dim == 64
    for bad in ((63, 1, 1e4), (0, 1, 1e4), (-2, 1, 1e4), (4, -1, 1e4), (4, 1, 0.0), (4, 1, float("nan"))):
        with pytest.raises(BackendError, match="RoPEConfig"):
            RoPEConfig(*bad)


@pytest.mark.clause("KN-PARAMS-2")
def test_attention_params():
    params = AttentionParams(9, 3, 64, 0.125, True)
    assert params.sliding_window == 0
    for changes in (
        *({"num_kv_heads": 2}, {"num_heads": 0}, {"num_kv_heads": 0}, {"head_dim": 0}),
        *({"sliding_window": -1}, {"sliding_window": 4, "causal": False}),
    ):
        with pytest.raises(BackendError, match="AttentionParams"):
            dataclasses.replace(params, **changes)


@pytest.mark.clause("KN-PARAMS-3")
def test_sampling_params_and_schemes():
    assert KernelSamplingParams is kernel_ops.SamplingParams
    names = [field.name for field in dataclasses.fields(KernelSamplingParams)]
    assert names == [
        *("temperature", "top_k", "top_p", "repetition_penalty"),
        *("repetition_token_ids", "repetition_token_freqs", "rng_seed"),
    ]
    with pytest.raises(TypeError):
        KernelSamplingParams()
    assert QuantScheme.Q4_0(32) == QuantScheme.Q4_0(group_size=32) != QuantScheme.Q8_0(32)
    assert isinstance(QuantScheme.Q8_0(64), QuantScheme)
    match QuantScheme.Q8_0(64):
        case QuantScheme.Q4_0():
            pytest.fail("a Q8_0 matched as Q4_0")
        case QuantScheme.Q8_0(group_size=size):
            assert size == 64


@pytest.mark.clause("KN-PARAMS-4")
def test_widths():
    sampling = KernelSamplingParams(1.0, 0, 1.0, 1.0, [], [], 2**32 - 1)
    for changes in ({"rng_seed": 2**32}, {"rng_seed": -1}, {"top_k": -1}, {"top_k": 2**64}, {"top_k": 1.5}):
        with pytest.raises(InvalidParameterError, match=f"SamplingParams: {next(iter(changes))}"):
            dataclasses.replace(sampling, **changes)
    with pytest.raises(InvalidParameterError, match="RoPEConfig: head_dim"):
        RoPEConfig(64.0, 1, 1e4)
    with pytest.raises(InvalidParameterError, match="RoPEConfig: max_seq_len"):
        RoPEConfig(64, 2**64, 1e4)
    with pytest.raises(InvalidParameterError, match="AttentionParams: sliding_window"):
        AttentionParams(1, 1, 1, 1.0, True, 1.5)
    for scheme in (QuantScheme.Q4_0, QuantScheme.Q8_0):
        with pytest.raises(BackendError, match="group_size is 0"):
            scheme(0)
        with pytest.raises(InvalidParameterError, match="group_size"):
            scheme(32.5)
        with pytest.raises(TypeError):
            scheme()
    for cls, count in ((RoPEConfig, 3), (AttentionParams, 5), (KernelSamplingParams, 7)):
        required = [f for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        assert len(required) == count


@pytest.mark.clause("KN-PARTS-1")
def test_defaults():
    nothing = Nothing()
    for part in ("norm", "position", "attention", "activation", "linear", "sampling"):
        assert getattr(nothing, f"{part}_ops")() is None

    class Attention(AttentionOps):
        def attention(self, q, k, v, params):
            return q

    class Linear(LinearOps):
        def linear(self, input, weight):
            return input

    x, params = tensor(1.0), AttentionParams(1, 1, 1, 1.0, True)
    with pytest.raises(UnsupportedError, match="paged_attention"):
        Attention().paged_attention(x, x, x, [0], params)
    with pytest.raises(UnsupportedError, match="write_kv"):
        Attention().write_kv(x, x, [0])
    with pytest.raises(UnsupportedError, match="embedding"):
        Linear().embedding(x, [0])
    with pytest.raises(UnsupportedError, match="quantized_linear"):
        Linear().quantized_linear(x, x, QuantScheme.Q4_0(32))


@pytest.mark.clause("KN-DISPATCH-4")
def test_the_default_algorithm_is_plain_float32():
    assert Nothing().declared_algorithm("linear") == Algorithm()
    assert Algorithm().accumulate == "fp32"


@pytest.mark.clause("KN-DISPATCH-2")
@pytest.mark.parametrize("ops", [None, Nothing(), BACKEND.kernel_ops()], ids=["none", "empty", "numpy"])
def test_linear_transposes_on_both_paths(ops):
    dispatch = KernelOpsDispatch.new(ops, OPS)
    weight = tensor([1.0, 2.0], [3.0, 4.0])
    assert dispatch.linear(tensor([1.0, 1.0]), weight).to_vec_f32().tolist() == [3, 7]  # upstream's fallback: [4, 6]
    assert dispatch.linear(tensor(1.0, 1.0), weight).shape() == (2,)
    rectangular = tensor([1.0, 0.0, 2.0], [0.0, 1.0, 0.0])
    y = dispatch.linear(tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]]), rectangular)
    assert y.to_numpy().tolist() == [[[7, 2], [2, 0]]]
    with pytest.raises(BackendError):
        dispatch.linear(tensor(1.0, 1.0), tensor(1.0, 1.0))


class Recorder:
    """Stands for a part or for TensorOps and tells who was called."""

    def __init__(self, label, log):
        self.label, self.log = label, log

    def __getattr__(self, name):
        def call(*arguments):
            self.log.append(f"{self.label}.{name}")
            return arguments[0]

        return call


@pytest.mark.clause("KN-DISPATCH-1")
def test_parts_come_first():
    log = []

    class All(Nothing):
        def norm_ops(self):
            return Recorder("norm", log)

        def activation_ops(self):
            return Recorder("activation", log)

        def linear_ops(self):
            return Recorder("linear", log)

    x = tensor([1.0])
    calls = {
        "rms_norm": (x, x, 0.0),
        "gelu": (x,),
        "silu": (x,),
        "silu_mul": (x, x),
        "linear": (x, x),
        "softmax": (x, 0),
    }
    for ops in (All(), Nothing(), None):
        dispatch = KernelOpsDispatch(ops, Recorder("tensor", log))
        assert dispatch.kernel_ops() is ops
        assert isinstance(dispatch.tensor_ops(), Recorder)
        for name, arguments in calls.items():
            getattr(dispatch, name)(*arguments)
    fallback = ["rms_norm", "gelu", "silu", "silu", "mul", "transpose", "matmul", "softmax"]
    assert log == [
        *("norm.rms_norm", "activation.gelu", "tensor.silu", "activation.silu_mul", "linear.linear", "tensor.softmax"),
        *(f"tensor.{name}" for name in fallback * 2),
    ]


@pytest.mark.clause("KN-RMSNORM-5", "KN-RMSNORM-6", "KN-DISPATCH-3")
def test_the_default_residual_norm_works():
    x, residual, weight = tensor([1.0, 2.0]), tensor([2.0, 2.0]), tensor(1.0, 2.0)
    expected = np.array([3, 8]) / np.sqrt(12.5)
    for y, r in (
        NormOnly.Part().rms_norm_residual(x, residual, weight, 0.0),  # upstream: Unsupported (D-16)
        KernelOpsDispatch(NormOnly(), OPS).rms_norm_residual(x, residual, weight, 0.0),
        KernelOpsDispatch(None, OPS).rms_norm_residual(x, residual, weight, 0.0),
        KernelOpsDispatch(BACKEND.kernel_ops(), OPS).rms_norm_residual(x, residual, weight, 0.0),
    ):
        np.testing.assert_allclose(y.to_numpy()[0], expected, rtol=4 * 2**-24)
        assert r.to_numpy().tolist() == [[3, 4]]


@pytest.mark.clause("KN-RMSNORM-5", "KN-DISPATCH-3")
def test_tensors_without_addition():
    class Bare:
        pass

    with pytest.raises(UnsupportedError, match="Bare has no '\\+'"):
        NormOnly.Part().rms_norm_residual(Bare(), Bare(), Bare(), 0.0)
    log = []
    KernelOpsDispatch(NormOnly(), Recorder("tensor", log)).tensor_ops().add(1, 2)
    with pytest.raises(BackendError):  # NormOnly's norm knows NumpyTensors only: the sum came from TensorOps.add
        KernelOpsDispatch(NormOnly(), Recorder("tensor", log)).rms_norm_residual(Bare(), Bare(), tensor(1.0), 0.0)
    assert log == ["tensor.add", "tensor.add"]


@pytest.mark.clause("KN-RMSNORM-6")
def test_built_of_two_operations_the_norm_reads_the_rounded_sum():
    bf16 = [
        tensor(*row).to_dtype(BACKEND.capabilities().supported_dtypes[2])
        for row in ([256.0, 1.0], [1.0, 0.0], [128.0] * 2)
    ]
    assert str(bf16[0].dtype()) == "bf16"
    two = KernelOpsDispatch(None, OPS).rms_norm_residual(*bf16, 0.0)[0].to_vec_f32()
    one = KernelOpsDispatch(BACKEND.kernel_ops(), OPS).rms_norm_residual(*bf16, 0.0)[0].to_vec_f32()
    assert two[1] > one[1]  # 128 / rms of [256, 1] and of [257, 1]
