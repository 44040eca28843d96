"""Running cases: repeatable inputs, four outcomes, cells and their report."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import InvalidParameterError, UnsupportedError
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.parity import runner
from ferrum_ref.parity.cells import failures_in_turn, gather, has_failed
from ferrum_ref.parity.honest.attention import attention
from ferrum_ref.parity.ops.catalogue import OPERATIONS, operation_named
from ferrum_ref.parity.ops.operation import NOT_FINITE, Inputs
from ferrum_ref.parity.report import cells_as_json, failure_lines, hint_of, parity_table, summary_line
from ferrum_ref.parity.runner import FAILED, PASSED, SKIPPED, UNSUPPORTED, WAIVED, Selection, draw_case, run, run_case
from ferrum_ref.parity.subject import BackendSubject, FunctionSubject
from ferrum_ref.parity.units import STORAGES
from ferrum_ref.types.algorithm import Algorithm

FP32 = STORAGES["fp32"]
ADD = operation_named("add")


def honest_add(inputs: Inputs) -> tuple[np.ndarray[Any, Any], ...]:
    with np.errstate(invalid="ignore", over="ignore"):  # infinity minus infinity, and what is beyond the largest
        total = inputs.arrays["a"].astype(np.float32) + inputs.arrays["b"].astype(np.float32)
    return (total.astype(inputs.storage.numpy_dtype),)


def subject_of(function: Any, **algorithms: Algorithm) -> FunctionSubject:
    return FunctionSubject("mine", {"add": function}, algorithms)


@pytest.mark.clause("PA-RUN-1")
def test_inputs_are_the_same_in_every_process(repository: Path) -> None:
    code = (
        "import zlib; from ferrum_ref.parity.runner import *; from ferrum_ref.parity.ops.catalogue import *\n"
        "inputs = draw_case(operation_named('paged_attention'), STORAGES['bf16'], 1, 7)\n"
        "print([zlib.crc32(array.tobytes()) for array in inputs.arrays.values()], inputs.settings['table'].tolist())"
    )
    texts = {
        subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(texts) == 1
    first, again, other = (draw_case(ADD, FP32, 0, seed).arrays["a"] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first != draw_case(operation_named("mul"), FP32, 0, 3).arrays["a"]).any()


@pytest.mark.clause("PA-CASE-1", "PA-CASE-2", "PA-CASE-3")
def test_the_lists_hold_what_the_judge_promises() -> None:
    required = "rms_norm rms_norm_residual rotary_embedding attention paged_attention write_kv silu_mul gelu linear "
    required += "softmax embedding argmax matmul add mul silu gelu_tanh layer_norm sub div relu sample_token cast "
    required += (
        "quantized_linear_q4_0 quantized_linear_q8_0 concat split transpose permute tensor_rms_norm tensor_gelu "
    )
    required += "batch_matmul stack unstack pad_batch matmul_async softmax_async decode_step"
    assert {operation.name for operation in OPERATIONS} == set(required.split())
    named = [one for name in ("attention", "paged_attention") for one in operation_named(name).cases]
    attention = [one.sizes for one in named if one.probe != "drawn"]
    assert {1, 3, 4, 7, 8} <= {sizes["H"] // sizes["G"] for sizes in attention}
    assert {64, 80, 96, 120, 128, 192, 256} <= {sizes["D"] for sizes in attention}
    assert max(sizes.get("S", 0) for sizes in attention) == 131072
    assert max(max(sizes.get("lens", (0,)), default=0) for sizes in attention) == 131072
    for operation in OPERATIONS:
        assert len(operation.cases) >= 4
        labels = [case.label for case in operation.cases]
        assert len(set(labels)) == len(labels)
        drawn = [draw_case(operation, FP32, index, 0) for index, case in enumerate(operation.cases) if case.small]
        sizes = [array.size for inputs in drawn for array in inputs.arrays.values()]
        sizes += [len(inputs.settings["ids"]) for inputs in drawn if "ids" in inputs.settings]
        sizes += [inputs.settings["start"] for inputs in drawn if "start" in inputs.settings]
        assert operation.name in ("argmax", "sample_token") or 0 in sizes  # an empty row has no largest element


@pytest.mark.clause("PA-CASE-3")
def test_what_nobody_owns_holds_nan_and_views_have_nan_between_their_elements() -> None:
    paged = operation_named("paged_attention")
    for index, case in enumerate(paged.cases[:10]):
        cache = draw_case(paged, FP32, index, 0).arrays["k_cache"]
        owned = int(np.isfinite(cache).all(axis=(2, 3)).sum())
        assert owned == sum(case.sizes["lens"])
        assert np.isnan(cache).any()
    norm = operation_named("rms_norm")
    index = next(index for index, case in enumerate(norm.cases) if case.probe == "strided")
    x = draw_case(norm, FP32, index, 0).arrays["x"]
    assert not x.flags.c_contiguous
    assert x.base is not None
    assert np.isnan(x.base[..., 1::2]).all()


@pytest.mark.clause("PA-RUN-2", "PA-RUN-3", "PA-RUN-4", "PA-SUBJECT-2")
def test_passed_unsupported_failed_and_tampering_are_told_apart() -> None:
    def refuse(inputs: Inputs) -> tuple[Any, ...]:
        raise UnsupportedError("add: not on this device")

    def crash(inputs: Inputs) -> tuple[Any, ...]:
        raise ZeroDivisionError("at last")

    def tamper(inputs: Inputs) -> tuple[Any, ...]:
        outputs = honest_add(inputs)
        inputs.arrays["a"][...] = 0
        return outputs

    results = {one.__name__: run_case(subject_of(one), ADD, FP32, 0, 0) for one in (honest_add, refuse, crash, tamper)}
    assert {name: result.status for name, result in results.items()} == {
        "honest_add": PASSED,
        "refuse": UNSUPPORTED,
        "crash": FAILED,
        "tamper": FAILED,
    }
    assert results["refuse"].message == "add: not on this device"
    assert results["crash"].message == "raised ZeroDivisionError: at last"
    assert "changed its input a, or what lies beside it" in results["tamper"].message
    assert run_case(subject_of(lambda inputs: ()), ADD, FP32, 0, 0).message == "returned 0 outputs, expected 1"
    assert run_case(subject_of(honest_add), operation_named("mul"), FP32, 0, 0).status == UNSUPPORTED


@pytest.mark.clause("PA-RUN-4")
def test_settings_and_what_lies_beside_a_view_may_not_change_either() -> None:
    """A kernel that shortens the lengths in place would be compared with what the shorter lengths give."""

    def shortens(inputs: Inputs) -> tuple[Any, ...]:
        inputs.settings["lens"][...] = np.maximum(inputs.settings["lens"] - 1, 0)
        return attention("plain")(inputs)

    paged = operation_named("paged_attention")
    result = run_case(FunctionSubject("mine", {"paged_attention": shortens}), paged, FP32, 0, 0)
    assert (result.status, "changed its input lens" in result.message) == (FAILED, True)

    def writes_contiguously(inputs: Inputs) -> tuple[Any, ...]:
        outputs = honest_add(inputs)
        inputs.arrays["a"].base[0, 1] = 0.0
        return outputs

    strided = next(index for index, case in enumerate(ADD.cases) if case.probe == "strided")
    assert "changed its input a" in run_case(subject_of(writes_contiguously), ADD, FP32, strided, 0).message


@pytest.mark.clause("PA-RUN-2", "PA-SUBJECT-1")
def test_a_backend_without_a_part_or_a_dtype_is_unsupported_there(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make_backend()
    subject = BackendSubject(backend, "numpy")
    monkeypatch.setattr(backend.kernel_ops(), "norm_ops", lambda: None)
    result = run_case(subject, operation_named("rms_norm"), FP32, 0, 0)
    assert (result.status, "norm_ops" in result.message) == (UNSUPPORTED, True)
    monkeypatch.setattr(backend, "kernel_ops", lambda: None)
    assert run_case(subject, operation_named("linear"), FP32, 0, 0).status == UNSUPPORTED
    assert subject.declared(ADD) == Algorithm()
    assert run_case(subject, ADD, FP32, 0, 0).status == PASSED
    capabilities = backend.capabilities()
    capabilities.supported_dtypes.remove(STORAGES["bf16"].data_type)
    monkeypatch.setattr(backend, "capabilities", lambda: capabilities)
    assert run_case(subject, ADD, STORAGES["bf16"], 0, 0).status == UNSUPPORTED


@pytest.mark.clause("PA-SUBJECT-1", "PA-VERDICT-4")
def test_the_declaration_decides_the_bound() -> None:
    def sloppy(inputs: Inputs) -> tuple[Any, ...]:
        return (honest_add(inputs)[0] * np.float32(1 + 2.0**-21),)

    assert run_case(subject_of(sloppy), ADD, FP32, 0, 0).status == FAILED
    assert run_case(subject_of(sloppy, add=Algorithm(extra_roundings=9)), ADD, FP32, 0, 0).status == PASSED


@pytest.mark.clause("PA-RUN-5", "PA-REPORT-1", "PA-REPORT-2")
def test_a_budget_skips_the_rest_and_every_case_is_counted() -> None:
    ticks = iter(range(1000))
    selection = Selection(operations=["add"], dtypes=["fp32"], num_seeds=3)
    results = list(run(subject_of(honest_add), selection, budget_s=5.0, clock=lambda: float(next(ticks))))
    (cell,) = gather(results)
    assert cell.num_cases == 3 * len(ADD.cases)
    assert (cell.counts[PASSED], cell.counts[SKIPPED]) == (4, cell.num_cases - 4)
    assert cell.status == PASSED
    assert "budget of 5 s" in cell.reason
    assert summary_line([cell]) == f"4 passed, 0 failed, 0 unsupported, {cell.num_cases - 4} skipped"
    skipped = gather(run(subject_of(honest_add), selection, budget_s=0.0))
    assert [one.status for one in skipped] == [SKIPPED]
    assert not has_failed(skipped)


@pytest.mark.clause("PA-REPORT-1", "PA-REPORT-2", "PA-REPORT-3", "PA-REPORT-4")
def test_a_failure_says_where_and_how_to_see_it_again() -> None:
    def wrong_once(inputs: Inputs) -> tuple[Any, ...]:
        (total,) = honest_add(inputs)
        if total.shape == (3, 7):
            total[2, 4] += 1
        return (total,)

    cells = gather(run(subject_of(wrong_once), Selection(operations=["add"], dtypes=["fp32"], first_seed=5)))
    (cell,) = cells
    assert has_failed(cells)
    assert (cell.status, cell.counts[FAILED], cell.counts[PASSED]) == (FAILED, 1, len(ADD.cases) - 1)
    text = "\n".join(failure_lines(cell.failures[0]))
    for part in ("FAILED add fp32 case 0 seed 5: a=3x7 b=3x7 iid", "y at axis0 2, axis1 4: expected", "bound"):
        assert part in text
    assert text.endswith("run it again: ferrum-ref parity --backend mine --op add --dtype fp32 --case 0 --seed 5")
    document = cells_as_json(cells)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document[0]["worst_case"]["worst"]["coordinates"] == {"axis0": 2, "axis1": 4}
    assert document[0]["cases"] == {PASSED: len(ADD.cases) - 1, FAILED: 1, UNSUPPORTED: 0, SKIPPED: 0, WAIVED: 0}


@pytest.mark.clause("PA-REPORT-7")
def test_every_broken_cell_is_among_the_first_failures_and_a_hint_stands_beside_the_number() -> None:
    def off(factor: float) -> Any:
        def run_off(inputs: Inputs) -> tuple[Any, ...]:
            with np.errstate(all="ignore"):
                (total,) = honest_add(inputs)
                return ((total.astype(np.float64) * factor).astype(total.dtype),)

        return run_off

    cells = gather(run(subject_of(off(1.0 + 2 * 2.0**-8)), Selection(operations=["add"], only_small=True)))
    first = failures_in_turn(cells)
    assert [failure.dtype for failure in first[:3]] == ["fp32", "fp16", "bf16"]
    assert [failure.ratio_det for failure in first[:3]] == [cell.ratio_det for cell in cells]
    assert sorted(map(id, first)) == sorted(id(one) for cell in cells for one in cell.failures)
    assert "other numbers are computed than asked for" in "\n".join(failure_lines(first[0]))
    assert "not declared: take it out, or declare it" in "\n".join(failure_lines(cells[2].failures[0]))
    assert hint_of(replace(first[0], verdict=None)) == ""
    assert failures_in_turn([]) == []


@pytest.mark.clause("PA-CASE-2")
def test_every_operation_goes_beyond_the_usual_block_sizes() -> None:
    """More than 64 queries, 16 heads, 8 sequences, 64 rows, 128 columns, 1,024 elements: a kernel's first block."""
    small = {operation.name: [one.sizes for one in operation.cases if one.small] for operation in OPERATIONS}
    assert max(sizes.get("T", 0) for sizes in small["attention"]) > 64
    for name in ("attention", "rotary_embedding"):
        assert max(sizes.get("H", 0) for sizes in small[name]) > 16
    assert max(len(sizes.get("lens", ())) for sizes in small["paged_attention"]) > 8
    for name in ("rms_norm", "rms_norm_residual", "layer_norm", "silu_mul", "gelu"):
        assert max(sizes.get("shape", (0,))[0] for sizes in small[name]) > 64
    for name in ("linear", "quantized_linear_q4_0"):
        assert max(sizes.get("N", 0) for sizes in small[name]) > 128
    assert max(sizes.get("x", (0,))[0] for sizes in small["linear"] if len(sizes.get("x", ())) == 2) > 64
    for name in ("add", "relu", "concat", "split", "transpose", "permute", "stack", "unstack", "pad_batch"):
        operation = operation_named(name)
        drawn = (draw_case(operation, FP32, index, 0) for index, one in enumerate(operation.cases) if one.small)
        assert max(array.size for inputs in drawn for array in inputs.arrays.values()) > 1024


@pytest.mark.clause("PA-CASE-2")
def test_one_row_of_nan_is_there_and_no_other_row_notices() -> None:
    for name in ("rms_norm", "layer_norm", "linear", "softmax", "rms_norm_residual"):
        operation = operation_named(name)
        index = next(index for index, one in enumerate(operation.cases) if one.probe == NOT_FINITE)
        inputs = draw_case(operation, FP32, index, 0)
        with np.errstate(all="ignore"):
            value = np.asarray(operation.expect(inputs, Algorithm())[0].value)
        broken = ~np.isfinite(inputs.arrays["x"]).all(axis=-1)
        assert broken.any()
        assert not broken.all()
        np.testing.assert_array_equal(np.isnan(value).any(axis=-1), broken)


@pytest.mark.clause("PA-REPORT-1")
def test_the_table_has_a_row_for_each_operation_and_every_state() -> None:
    def half(inputs: Inputs) -> tuple[Any, ...]:
        if inputs.storage.name == "fp16":
            raise UnsupportedError("no fp16")
        return honest_add(inputs)

    from rich.console import Console

    cells = gather(run(subject_of(half), Selection(operations=["add", "mul"])))
    console = Console(width=160, file=io.StringIO())
    console.print(parity_table(cells, "a title"))
    text = console.file.getvalue()
    assert "add" in text
    assert "unsupp." in text
    assert "passed, in part" in text
    assert "unsupported" in text


def test_a_selection_refuses_what_does_not_exist() -> None:
    for wrong in (
        Selection(operations=["frobnicate"]),
        Selection(dtypes=["fp8"]),
        Selection(operations=["add"], case_index=99),
        Selection(num_seeds=0),
        Selection(first_seed=-1),
    ):
        with pytest.raises(InvalidParameterError):
            wrong.items()
    assert runner.Selection(operations=["add"], dtypes=["fp16"], case_index=2).items() == [
        (ADD, STORAGES["fp16"], 2, 0)
    ]
