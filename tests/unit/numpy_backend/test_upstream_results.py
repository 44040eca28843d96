"""Where upstream gives another result, both are offered: the reference's by default, upstream's on request."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ferrum_ref.errors import BackendError, InvalidParameterError, UnsupportedError
from ferrum_ref.interfaces.kernel_ops import AttentionParams, KernelOpsDispatch, KernelSamplingParams
from ferrum_ref.kernels.rope import rotary_embedding
from ferrum_ref.kernels.sampling import kept_probabilities, sample_token
from ferrum_ref.numpy_backend.factory import NumpyTensorFactory
from ferrum_ref.numpy_backend.kernel_ops import NumpyKernelOps
from ferrum_ref.numpy_backend.tensor_ops import NumpyTensorOps
from ferrum_ref.types.parity_mode import ParityMode

UPSTREAM = ParityMode.UPSTREAM
OPS, THEIRS = NumpyTensorOps(), NumpyTensorOps(UPSTREAM)
KERNELS, THEIR_KERNELS = NumpyKernelOps(), NumpyKernelOps(UPSTREAM)
FACTORY = NumpyTensorFactory()


def tensor(values):
    return FACTORY.from_numpy(np.array(values, np.float32))


@pytest.mark.clause("KN-DISPATCH-2", "KN-DISPATCH-5")
def test_linear_without_the_transpose():
    x, weight = tensor([[1, 1]]), tensor([[1, 2], [3, 4]])
    ours, theirs = KernelOpsDispatch(None, OPS), KernelOpsDispatch(None, OPS, parity_mode=UPSTREAM)
    assert ours.linear(x, weight).to_vec_f32().tolist() == [3, 7]
    assert theirs.linear(x, weight).to_vec_f32().tolist() == [4, 6]
    assert KernelOpsDispatch(KERNELS, OPS, parity_mode=UPSTREAM).linear(x, weight).to_vec_f32().tolist() == [3, 7]
    wide = tensor([[1, 2], [3, 4], [5, 6]])
    assert ours.linear(x, wide).to_vec_f32().tolist() == [3, 7, 11]
    with pytest.raises(BackendError, match="inner dimensions"):
        theirs.linear(x, wide)


@pytest.mark.clause("TN-OPS-12", "TN-OPS-7", "KN-GELU-1")
def test_gelu():
    two = tensor([2.0])
    exact, tanh = 0.5 * 2 * math.erfc(-math.sqrt(2)), 1 + math.tanh(math.sqrt(2 / math.pi) * (2 + 0.044715 * 8))
    assert OPS.gelu(two).to_vec_f32()[0] == np.float32(exact)
    assert THEIRS.gelu(two).to_vec_f32()[0] == np.float32(tanh)
    assert round(exact, 8) == 1.95449974
    assert round(tanh, 8) == 1.95459769
    for kernels in (KERNELS, THEIR_KERNELS):
        assert kernels.activation_ops().gelu(two).to_vec_f32()[0] == np.float32(exact)


@pytest.mark.clause("TN-OPS-13", "TN-OPS-9")
def test_split_drops_the_tail():
    t = tensor([1, 2, 3])
    assert [piece.to_vec_f32().tolist() for piece in THEIRS.split(t, (1, 1), 0)] == [[1], [2]]
    assert [piece.to_vec_f32().tolist() for piece in THEIRS.split(t, (1, 2), 0)] == [[1], [2, 3]]
    with pytest.raises(BackendError, match="sum to 3"):
        OPS.split(t, (1, 1), 0)
    for sizes in ((2, 2), (-1, 2)):
        with pytest.raises(BackendError, match="sum to 3"):
            THEIRS.split(t, sizes, 0)


@pytest.mark.clause("KN-ROPE-7", "KN-ROPE-2")
def test_positions_count_on_from_the_first():
    angles = np.arange(8)[:, None]
    cos, sin = tensor(np.cos(angles)), tensor(np.sin(angles))
    x = tensor([[[[1, 0]], [[1, 0]]]])

    def turned(ops, positions):
        out = ops.position_ops().rotary_embedding(x, cos, sin, positions).to_numpy()[0, :, 0]
        return np.round(np.arctan2(out[:, 1], out[:, 0]) % (2 * math.pi), 5).tolist()

    assert turned(KERNELS, [5, 0]) == [5, 0]
    assert turned(THEIR_KERNELS, [5, 0]) == [5, 6]
    assert turned(THEIR_KERNELS, [2]) == [2, 3]
    for ops in (KERNELS, THEIR_KERNELS):
        assert turned(ops, [3, 4]) == [3, 4]
        with pytest.raises(BackendError, match="position_ids"):
            ops.position_ops().rotary_embedding(x, cos, sin, [])
    with pytest.raises(InvalidParameterError, match="position 8"):
        THEIR_KERNELS.position_ops().rotary_embedding(x, cos, sin, [7, 0])
    arrays = (x.to_numpy(), cos.to_numpy(), sin.to_numpy())
    both = rotary_embedding(*arrays, np.array([5, 0]), parity_mode=UPSTREAM), rotary_embedding(*arrays, [5, 6])
    assert both[0].tobytes() == both[1].tobytes()


@pytest.mark.clause("KN-ATTN-9", "KN-ATTN-4", "KN-ATTN-6")
def test_attention_ignores_scale_and_window():
    q, k, v = tensor([[[[1]]]]), tensor([[[[0]], [[math.log(3)]]]]), tensor([[[[0]], [[4]]]])
    zero = AttentionParams(1, 1, 1, 0.0, False)
    assert KERNELS.attention_ops().attention(q, k, v, zero).to_vec_f32()[0] == 2
    assert THEIR_KERNELS.attention_ops().attention(q, k, v, zero).to_vec_f32()[0] == pytest.approx(3, rel=8 * 2**-24)
    none = tensor(np.zeros((1, 2, 1, 1)))
    window = AttentionParams(1, 1, 1, 1.0, True, sliding_window=1)
    assert KERNELS.attention_ops().attention(none, none, v, window).to_vec_f32().tolist() == [0, 4]
    assert THEIR_KERNELS.attention_ops().attention(none, none, v, window).to_vec_f32().tolist() == [0, 2]
    wide = tensor(np.zeros((1, 1, 1, 129)))
    assert KERNELS.attention_ops().attention(wide, wide, wide, AttentionParams(1, 1, 129, 1.0, True)).shape()[3] == 129
    with pytest.raises(UnsupportedError, match="head_dim=129, expected at most 128"):
        THEIR_KERNELS.attention_ops().attention(wide, wide, wide, AttentionParams(1, 1, 129, 1.0, True))


def drawn(part, logits, count=2000, **changes):
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    settings |= {"repetition_token_ids": [], "repetition_token_freqs": [], **changes}
    return [part.sample_token(logits, KernelSamplingParams(**settings, rng_seed=seed)) for seed in range(count)]


@pytest.mark.clause("KN-SAMPLE-9", "KN-SAMPLE-1")
def test_sampling_is_argmax():
    logits = tensor([math.log(1), math.log(3)])
    ours = drawn(KERNELS.sampling_ops(), logits)
    assert abs(ours.count(0) - 500) < 6 * math.sqrt(2000 * 0.1875)
    assert set(drawn(THEIR_KERNELS.sampling_ops(), logits, repetition_penalty=1e6, temperature=9.0)) == {1}
    with pytest.raises(BackendError, match="NaN"):
        drawn(THEIR_KERNELS.sampling_ops(), tensor([math.nan, 1]), 1)


@pytest.mark.clause("KN-SAMPLE-10", "KN-SAMPLE-4")
def test_candidates_keep_their_logits_and_the_whole_vocabulary_takes_part():
    logits = tensor([10, 0, -1])
    # upstream: a coin toss between two candidates
    assert drawn(KERNELS.sampling_ops(), logits, top_k=1) == [0] * 2000
    assert drawn(KERNELS.sampling_ops(), logits, top_k=2).count(0) > 1990
    for temperature, gap in ((1.0, 10), (0.5, 20)):
        p = kept_probabilities(np.array([10.0, 0.0, -1.0]) / temperature, 2, 1.0)
        assert p.tolist() == pytest.approx([1 / (1 + math.exp(-gap)), 1 / (1 + math.exp(gap)), 0], rel=8 * 2**-53)
    cool = drawn(KERNELS.sampling_ops(), tensor([2, 0, -1]), temperature=0.5, top_k=2)
    assert 0 < cool.count(1) < 120  # upstream: never, below temperature 1; here 36 are expected
    row = np.zeros(1000, np.float32)
    row[700] = 30
    assert KERNELS.sampling_ops().argmax(tensor(row)) == 700
    assert set(drawn(KERNELS.sampling_ops(), tensor(row), 50, top_p=0.9)) == {700}
    before = row.copy()
    sample_token(row, temperature=1.0, top_k=3, top_p=0.5, repetition_penalty=2.0, repetition_token_ids=[700],
                 repetition_token_freqs=[1], rng_seed=3)  # fmt: skip
    assert (row == before).all()
