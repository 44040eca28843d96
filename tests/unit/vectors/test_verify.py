"""Verdicts on submitted outputs: the reference passes, and each way of being wrong is told for what it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ferrum_ref.errors import InvalidFormatError, InvalidParameterError, NotFoundError
from ferrum_ref.vectors.schema import Manifest
from ferrum_ref.vectors.verify import FAIL, MISSING, NAN, PASS, WRONG_DTYPE, WRONG_SHAPE, check_outputs

Arrays = Mapping[str, Any]
Submit = Callable[[Arrays], Path]
NORM = "rms_norm.fp32.2"


def changed(outputs: Arrays, name: str, array: Any) -> Arrays:
    return {**outputs, name: array}


@pytest.mark.clause("GV-CHECK-1", "GV-CHECK-3", "GV-BOUND-2")
def test_the_reference_passes_every_vector(vector_set: Path, reference: Arrays, submit: Submit) -> None:
    check = check_outputs(vector_set, submit(reference))
    assert [one.vector.name for one in check.results if one.worst.status != PASS] == []
    assert check.passed
    assert check.unexpected == ()
    assert 0.05 < max(one.worst.ratio for one in check.results) <= 1.0


@pytest.mark.clause("GV-CHECK-3", "GV-BOUND-3")
def test_the_verdict_of_every_element_is_the_plain_rule(
    manifest: Manifest, stored: Arrays, vector_set: Path, reference: Arrays, submit: Submit
) -> None:
    """Every output moved by 1.5 bounds fails, by 0.75 of what is left of the bound passes: by the rule written out."""
    rng = np.random.default_rng(5)
    outputs, right = {}, {}
    for vector in manifest.vectors:
        right[vector.name] = True
        for output in vector.outputs:
            got = np.array(reference[vector.submitted_tensor(output.name)])
            if not output.exact and got.size:
                value = stored[vector.value_tensor(output.name)]
                bound = stored[vector.bound_tensor(output.name)]
                place = np.unravel_index(rng.integers(got.size), got.shape)
                got[place] = np.float64(value[place]) + rng.choice([-1.5, 1.5]) * bound[place]
                with np.errstate(invalid="ignore"):
                    wide = got.astype(np.float64)
                    inside = np.abs(wide - value) <= bound
                same = np.isnan(wide) & np.isnan(value) | (np.isinf(value) & (wide == value))
                right[vector.name] &= bool(np.all(np.where(np.isfinite(value), inside, same)))
            outputs[vector.submitted_tensor(output.name)] = got
    check = check_outputs(vector_set, submit(outputs))
    assert {one.vector.name: one.worst.status == PASS for one in check.results} == right
    assert 0 < sum(right.values()) < len(right) / 3


@pytest.mark.clause("GV-CHECK-2", "GV-CHECK-4", "GV-CHECK-5")
def test_one_wrong_element_is_named(vector_set: Path, reference: Arrays, submit: Submit) -> None:
    wrong = reference[f"{NORM}/y"].copy()
    wrong[2, 5] *= np.float32(1.01)
    check = check_outputs(vector_set, submit(changed(reference, f"{NORM}/y", wrong)))
    (failed,) = (one for one in check.results if one.worst.status != PASS)
    assert failed.vector.name == NORM
    assert failed.worst.status == FAIL
    assert failed.worst.message.startswith("y[row 2, feature 5]: got ")
    assert "err/bound" in failed.worst.message
    assert "1 of 132 elements is wrong: row 2, feature 5" in failed.worst.message
    assert failed.worst.ratio > 1.0
    assert not check.passed


@pytest.mark.clause("GV-CHECK-2", "GV-CHECK-4")
def test_nan_missing_shape_and_type_are_told_apart(vector_set: Path, reference: Arrays, submit: Submit) -> None:
    names = [f"rms_norm.fp32.{number}" for number in (1, 2, 3, 7)]
    first, second, third, fourth = (f"{name}/y" for name in names)
    holed = reference[first].copy()
    holed[0, 0] = np.nan
    outputs = {
        **{name: array for name, array in reference.items() if name != second},
        first: holed,
        third: reference[third].T,
        fourth: reference[fourth].astype(np.float64),
    }
    check = check_outputs(vector_set, submit(outputs))
    found = {one.vector.name: one.worst for one in check.results if one.worst.status != PASS}
    assert {name: one.status for name, one in found.items()} == dict(
        zip(names, (NAN, MISSING, WRONG_SHAPE, WRONG_DTYPE), strict=True)
    )
    assert found[names[0]].message.startswith("y[row 0, feature 0]: got nan, expected ")
    assert found[names[1]].message == f"the file has no tensor '{second}'"
    assert found[names[2]].message == "y: shape [70, 3], expected [3, 70]"
    assert found[names[3]].message == "y: element type F64, expected F32: store the result as that"
    assert all(one.ratio == math.inf for one in found.values())


@pytest.mark.clause("GV-CHECK-2")
@pytest.mark.parametrize("output", ["y", "residual"])
def test_each_of_two_outputs_counts(output: str, vector_set: Path, reference: Arrays, submit: Submit) -> None:
    name = f"rms_norm_residual.fp32.2/{output}"
    check = check_outputs(vector_set, submit(changed(reference, name, reference[name] + np.float32(0.5))))
    (failed,) = (one for one in check.results if one.worst.status != PASS)
    assert failed.vector.name == "rms_norm_residual.fp32.2"
    assert failed.worst.name == output
    assert [one.status == PASS for one in failed.outputs] == [output != "y", output != "residual"]


@pytest.mark.clause("GV-CHECK-3", "GV-BOUND-3")
def test_a_number_where_nan_is_the_result_fails(vector_set: Path, reference: Arrays, submit: Submit) -> None:
    name = "softmax.fp32.10/p"  # a lane of -inf only
    outputs = changed(reference, name, np.nan_to_num(reference[name]))
    (failed,) = (one for one in check_outputs(vector_set, submit(outputs)).results if one.worst.status != PASS)
    assert failed.vector.name == "softmax.fp32.10"
    assert failed.worst.status == FAIL


@pytest.mark.clause("GV-BOUND-3", "GV-CHECK-4")
@pytest.mark.parametrize(
    ("name", "told"), [("argmax.fp32.0/index", "exact"), ("write_kv.fp32.2/cache", "exact"), ("embedding.bf16.3/y", "")]
)
def test_an_exact_output_fails_by_one_unit(
    name: str, told: str, vector_set: Path, reference: Arrays, submit: Submit
) -> None:
    wrong = np.array(reference[name])
    bits = wrong.view({8: np.uint64, 4: np.uint32, 2: np.uint16}[wrong.dtype.itemsize]).reshape(-1)
    bits[-1] += 1
    check = check_outputs(vector_set, submit(changed(reference, name, wrong)))
    (failed,) = (one for one in check.results if one.worst.status != PASS)
    assert name.startswith(failed.vector.name)
    assert told in failed.worst.message


@pytest.mark.clause("GV-BOUND-3")
def test_the_sign_of_zero_counts_in_an_exact_output(vector_set: Path, reference: Arrays, submit: Submit) -> None:
    name = "embedding.fp32.3/y"
    assert np.signbit(reference[name][0, 0])
    outputs = changed(reference, name, np.abs(reference[name]))
    assert not check_outputs(vector_set, submit(outputs), ["embedding"]).passed


def sixteen_bit_sum(x: Any, weight: Any) -> Any:
    y = np.zeros((x.shape[0], weight.shape[0]), dtype=ml_dtypes.bfloat16)
    for column in range(x.shape[1]):
        y = y + x[:, column, None] * weight[None, :, column]
    return y


@pytest.mark.clause("GV-BOUND-2", "GV-CHECK-3")
def test_known_bugs_fail_on_the_vectors_made_for_them(
    vector_set: Path, stored: Arrays, reference: Arrays, submit: Submit
) -> None:
    """A 16-bit sum, the last of the largest, GPT-J's pairing, one-pass variance."""
    x, weight = (stored[f"linear.bf16.10/in/{name}"] for name in ("x", "weight"))
    logits = stored["argmax.fp32.0/in/logits"]
    turned, rows = stored["rotary_embedding.fp32.10/in/x"], stored["rotary_embedding.fp32.10/in/positions"]
    cos, sin = (stored[f"rotary_embedding.fp32.10/in/{name}"][rows][:, None, :] for name in ("cos", "sin"))
    adjacent = np.stack(
        [turned[..., ::2] * cos - turned[..., 1::2] * sin, turned[..., 1::2] * cos + turned[..., ::2] * sin], -1
    ).reshape(turned.shape)
    far, gain, bias = (stored[f"layer_norm.fp32.12/in/{name}"] for name in ("x", "weight", "bias"))
    mean = far.mean(-1, keepdims=True)
    one_pass = np.square(far).mean(-1, keepdims=True) - np.square(mean)
    outputs = {
        **reference,
        "linear.bf16.10/y": sixteen_bit_sum(x, weight),
        "argmax.fp32.0/index": np.array(logits.size - 1 - np.argmax(logits[::-1]), dtype=np.int64),
        "rotary_embedding.fp32.10/y": adjacent,
        "layer_norm.fp32.12/y": (far - mean) / np.sqrt(np.abs(one_pass) + np.float32(1e-5)) * gain + bias,
    }
    check = check_outputs(vector_set, submit(outputs))
    assert [one.vector.name for one in check.results if one.worst.status == FAIL] == [
        "layer_norm.fp32.12",
        "rotary_embedding.fp32.10",
        "linear.bf16.10",
        "argmax.fp32.0",
    ]


@pytest.mark.clause("GV-CHECK-1", "GV-CHECK-5")
def test_only_what_is_asked_for_is_missed(vector_set: Path, reference: Arrays, submit: Submit) -> None:
    path = submit({name: array for name, array in reference.items() if name.startswith("gelu.fp32")})
    assert check_outputs(vector_set, path, ["gelu"], ["fp32"]).passed
    wider = check_outputs(vector_set, path, ["gelu"])
    assert {one.vector.storage for one in wider.results if one.worst.status == MISSING} == {"fp16", "bf16"}
    assert len(check_outputs(vector_set, path).results) > 140
    with pytest.raises(InvalidParameterError, match="operation 'gelo'"):
        check_outputs(vector_set, path, ["gelo"])
    with pytest.raises(InvalidParameterError, match="dtype 'fp8'"):
        check_outputs(vector_set, path, [], ["fp8"])
    with pytest.raises(InvalidParameterError, match="the set has none"):
        check_outputs(vector_set, path, ["gelu_tanh"], ["fp16"])


@pytest.mark.clause("GV-CHECK-6")
def test_tensors_that_nobody_asked_for_are_named(vector_set: Path, reference: Arrays, submit: Submit) -> None:
    check = check_outputs(vector_set, submit({**reference, "rms_norm.fp32.2/z": np.zeros(3)}))
    assert check.passed
    assert check.unexpected == ("rms_norm.fp32.2/z",)


@pytest.mark.clause("GV-CHECK-1")
def test_a_file_of_outputs_that_cannot_be_read(vector_set: Path, reference: Arrays, submit: Submit) -> None:
    path = submit(reference)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidFormatError, match=r"outputs\.safetensors"):
        check_outputs(vector_set, path)
    path.write_bytes(b"")
    with pytest.raises(InvalidFormatError, match=r"outputs\.safetensors"):
        check_outputs(vector_set, path)
    with pytest.raises(NotFoundError, match="no such file"):
        check_outputs(vector_set, path.with_name("other"))
