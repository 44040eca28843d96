"""The compiled form: which functions reach the compiler, how often, what it may change, and what happens without one.

Tests that really compile take seconds and are marked slow; the others put a stand-in in the compiler's place.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from ferrum_torch import fusing, make_backend, make_compiled_backend

from ferrum_ref.errors import ShapeError, UnsupportedError
from ferrum_ref.interfaces.kernel_ops import QuantScheme
from ferrum_ref.types.algorithm import Algorithm

RNG = np.random.default_rng(32)
BF16 = ml_dtypes.bfloat16


class Compiler:
    """In torch.compile's place: notes what it is given and what is called."""

    def __init__(self) -> None:
        self.given: list[str] = []
        self.called: list[tuple[str, tuple[Any, ...]]] = []

    def __call__(self, function: Callable[..., Any], *, dynamic: bool) -> Callable[..., Any]:
        assert dynamic
        self.given.append(function.__name__)

        def compiled(*arguments: Any) -> Any:
            shapes = tuple(tuple(data.shape) for data in arguments if isinstance(data, torch.Tensor))
            self.called.append((function.__name__, shapes))
            return function(*arguments)

        return compiled


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    stand_in = Compiler()
    monkeypatch.setattr(torch, "compile", stand_in)
    return stand_in


@pytest.fixture
def compiled(compiler: Compiler) -> Any:
    return make_compiled_backend()


def calls(backend: Any, dtype: Any = np.float32) -> dict[str, Callable[[], Any]]:
    """Every operation that has a chain to compile, on the same operands for every backend."""
    rng = np.random.default_rng(7)
    factory, ops, kernels = backend.tensor_factory(), backend.tensor_ops(), backend.kernel_ops()

    def normal(*shape: int) -> Any:
        return factory.from_numpy(rng.normal(size=shape).astype(np.float32).astype(dtype))

    x, y, w, b, heads = normal(2, 3, 8), normal(2, 3, 8), normal(8), normal(8), normal(2, 3, 4, 8)
    cos, sin, row = normal(5, 4), normal(5, 4), normal(1, 64)
    packed = {}
    for scheme, size in ((QuantScheme.Q4_0(32), 18), (QuantScheme.Q8_0(32), 34)):
        blocks = rng.integers(0, 255, (6, 2, size), dtype=np.uint8)
        blocks[..., 1] = 0x2C  # scales between 2**-4 and 2**-3
        packed[size] = (factory.from_numpy(blocks.reshape(6, -1)), scheme)
    linear, norm = kernels.linear_ops(), kernels.norm_ops()
    return {
        "_rms_norm": lambda: norm.rms_norm(x, w, 1e-5),
        "_rms_norm of TensorOps": lambda: ops.rms_norm(x, w, 1e-5),
        "_rms_norm_residual": lambda: norm.rms_norm_residual(x, y, w, 1e-5),
        "_layer_norm": lambda: ops.layer_norm(x, w, None, 1e-5),
        "_layer_norm_with_bias": lambda: ops.layer_norm(x, w, b, 1e-5),
        "_silu_rounded": lambda: ops.silu(x),
        "_silu_mul_rounded": lambda: kernels.activation_ops().silu_mul(x, y),
        "_gelu_rounded": lambda: ops.gelu(x),
        "_gelu_rounded of KernelOps": lambda: kernels.activation_ops().gelu(x),
        "_gelu_tanh_rounded": lambda: ops.gelu(x, approximate="tanh"),
        "_rotated": lambda: kernels.position_ops().rotary_embedding(heads, cos, sin, [4, 0, 2]),
        "row_by_q4_0": lambda: linear.quantized_linear(row, *packed[18]),
        "row_by_q8_0": lambda: linear.quantized_linear(row, *packed[34]),
    }


def outputs(result: Any) -> list[Any]:
    return [one.to_numpy() for one in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.clause("BK-TORCH-32")
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_the_chains_reach_the_compiler_and_nothing_else_changes(compiled: Any, compiler: Compiler, dtype: Any) -> None:
    assert compiler.given == ["_probe"]
    plain = calls(make_backend(), dtype)
    for name, call in calls(compiled, dtype).items():
        compiler.called.clear()
        got = outputs(call())
        assert [called for called, _ in compiler.called] == [name.partition(" ")[0]], name
        for one, other in zip(got, outputs(plain[name]()), strict=True):
            assert one.shape == other.shape
            assert one.dtype == other.dtype
            if not name.startswith("row_by"):  # sums of another order
                assert np.array_equal(one, other), name


@pytest.mark.clause("BK-TORCH-32")
def test_the_default_backend_compiles_nothing(compiler: Compiler) -> None:
    for call in calls(make_backend()).values():
        call()
    assert compiler.given == []


@pytest.mark.clause("BK-TORCH-32")
def test_once_for_each_combination_of_types_and_kinds_of_shapes(compiler: Compiler) -> None:
    run = fusing.Compiled()

    def twice(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    shapes = [((3,), (3,)), ((5,), (5,)), ((1,), (1,)), ((2, 3), (2, 3)), ((1, 3), (4, 3)), ((4, 3), (1, 3))]
    for a, b in shapes + shapes:
        assert run(twice, torch.ones(a), torch.ones(b)).shape == torch.broadcast_shapes(a, b)
    assert len(compiler.given) == 5
    run(twice, torch.ones(3), torch.ones(3, dtype=torch.bfloat16))
    assert len(compiler.given) == 6
    compiler.called.clear()
    assert run(twice, torch.ones(0), torch.ones(0)).shape == (0,)
    assert len(compiler.given) == 6  # nothing to compute, nothing compiled
    assert compiler.called == []


@pytest.mark.clause("BK-TORCH-32")
def test_each_combination_has_a_code_object_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts what it compiled by code object and stops at eight."""
    codes: set[int] = set()
    kept: list[Any] = []

    def compile_(function: Any, dynamic: bool) -> Any:
        kept.append(function)
        codes.add(id(function.__code__))
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    run = fusing.Compiled()
    for rank in range(1, 13):
        run(fusing._probe, torch.ones((2,) * rank))
    assert len(codes) == 12


@pytest.mark.clause("BK-TORCH-32")
def test_ranks_are_folded_before_the_compiler_sees_them(compiled: Any, compiler: Compiler) -> None:
    factory, ops = compiled.tensor_factory(), compiled.tensor_ops()
    compiler.given.clear()
    for shape in ((6, 4), (2, 3, 4), (2, 3, 2, 4)):
        x = factory.from_numpy(RNG.normal(size=shape).astype(np.float32))
        assert ops.rms_norm(x, factory.from_numpy(np.ones(4, np.float32)), 1e-5).shape() == shape
        assert ops.silu(x).shape() == shape
    assert compiler.given == ["_rms_norm", "_silu_rounded"]
    empty = factory.from_numpy(np.zeros((2, 0, 4), np.float32))
    assert ops.rms_norm(empty, factory.from_numpy(np.ones(4, np.float32)), 1e-5).shape() == (2, 0, 4)
    assert ops.gelu(empty).shape() == (2, 0, 4)


@pytest.mark.clause("BK-TORCH-32")
def test_operands_are_checked_before_the_compiler_sees_them(compiled: Any, compiler: Compiler) -> None:
    factory = compiled.tensor_factory()
    compiler.called.clear()
    with pytest.raises(ShapeError, match=r"weight \(2,\)"):
        compiled.tensor_ops().rms_norm(
            factory.from_numpy(np.ones((2, 3), np.float32)), factory.from_numpy(np.ones(2, np.float32)), 1e-5
        )
    assert compiler.called == []


@pytest.mark.clause("BK-TORCH-33")
def test_it_says_that_it_compiles(compiled: Any) -> None:
    assert compiled.name() == "torch"
    assert compiled.version() == f"torch {torch.__version__}, compiled"
    assert compiled.capabilities().extra_capabilities["compiled"] is True
    assert make_backend().capabilities().extra_capabilities["compiled"] is False


@pytest.mark.clause("BK-TORCH-33")
def test_a_compiler_that_fails_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def failing(*_: Any) -> Any:
        raise TorchDynamoException("\nInvalidCxxCompiler: No working C++ compiler found\n\nSet TORCH_LOGS")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: failing)
    with pytest.raises(
        UnsupportedError, match=r"failed \(InvalidCxxCompiler: No working C\+\+ compiler found\)"
    ) as told:
        make_compiled_backend()
    assert "install it, or leave 'compiled' out" in told.value.message
    assert "\n" not in told.value.message

    def other(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: other)
    with pytest.raises(RuntimeError, match="out of memory"):
        make_compiled_backend()


@pytest.mark.slow
@pytest.mark.clause("BK-TORCH-33")
def test_without_a_cpp_compiler(tmp_path: Path) -> None:
    program = (
        "from ferrum_torch import make_backend\nfrom ferrum_ref.errors import UnsupportedError\n"
        "try:\n    make_backend('cpu', compiled=True)\nexcept UnsupportedError as error:\n    print(error)"
    )
    environment = {**os.environ, "CXX": str(tmp_path / "no-such-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert "No working C++ compiler" in done.stdout, done.stderr
    assert "leave 'compiled' out" in done.stdout
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.clause("BK-TORCH-34")
def test_what_is_declared(compiled: Any) -> None:
    kernels = compiled.kernel_ops()
    for name in ("rms_norm", "silu_mul", "rotary_embedding", "linear", "attention"):
        assert kernels.declared_algorithm(name) == Algorithm()
    assert kernels.declared_algorithm("gelu").accumulate == "fp64"
    assert fusing.declared(Algorithm(), on_gpu=True) == Algorithm(div_ulp=2.0, flushes_subnormals=True)


@pytest.mark.slow
@pytest.mark.clause("BK-TORCH-32", "BK-TORCH-34")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_judge_passes_what_is_really_compiled(dtype: str) -> None:
    from ferrum_ref.parity.runner import PASSED, Selection, run
    from ferrum_ref.parity.subject import BackendSubject

    names = ("rms_norm_residual", "silu_mul", "rotary_embedding", "quantized_linear_q4_0", "quantized_linear_q8_0")
    subject = BackendSubject(make_compiled_backend(), "ferrum_torch:make_compiled_backend")
    results = run(subject, Selection(operations=names, dtypes=(dtype,), only_small=True))
    assert [result.message for result in results if result.status != PASSED] == []


@pytest.mark.slow
@pytest.mark.clause("BK-TORCH-32", "BK-TORCH-20")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_each_chain_compiles_whole_and_leaves_subnormals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """fullgraph: a chain that torch cannot take in one piece is an error instead of several kernels."""
    really = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: really(function, dynamic=dynamic, fullgraph=True))
    backend = make_compiled_backend()
    for name, call in calls(backend, BF16).items():
        assert all(np.isfinite(one.astype(np.float32)).all() for one in outputs(call())), name
    smallest = torch.full((4,), 2.0**-149)
    assert torch.equal(smallest * 1.0, smallest)
    x = backend.tensor_factory().from_numpy(np.array([-np.inf, -90.0, 0.0, np.inf], np.float32))
    y = backend.tensor_ops().silu(x).to_numpy()
    assert y[0] == y[2] == 0.0
    assert y[1] == pytest.approx(-90.0 * np.exp(-90.0), rel=8 * 2.0**-24)
    assert y[3] == np.inf
