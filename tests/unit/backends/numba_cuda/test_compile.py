"""Every kernel becomes PTX and machine code for sm_80 and sm_90, with no GPU or driver asked."""

from __future__ import annotations

import re

import pytest
from ferrum_numba.gpu import ahead
from ferrum_numba.gpu.kernel import Kernel, kernel
from ferrum_numba.gpu.kernels.catalogue import kernels

from ferrum_ref.errors import BackendError

MOST_THREADS, REGISTERS = 256, 65536  # of a block, and of a multiprocessor
CAPABILITIES = ((8, 0), (9, 0))
ALL = dict(kernels())
SAMPLE = (
    *(
        "rms_norm bf16 bf16",
        "layer_norm fp16 fp32",
        "softmax bf16",
        "unary gelu fp16 fp16",
        "binary silu_mul bf16 bf16 bf16",
    ),
    *("rotary_embedding bf16 fp32", "gather_strided uint16", "copy_rows uint32", "argmax bf16", "gemm bf16 bf16"),
    *("gemv bf16 q4_0", "gemv fp16 q8_0", "attention bf16", "merge bf16", "sample fp32"),
    *("place_cursor", "turn_and_store bf16 bf16"),
)
DECODE = ("place_cursor", "turn_and_store")
SHUFFLES = {"rms_norm", "rms_norm_residual", "layer_norm", "softmax", "argmax", "gemv", "attention", "sample"}


def check(name: str, made: Kernel, capability: tuple[int, int]) -> None:
    ptx = ahead.to_ptx(made, capability)
    code = "\n".join(line for line in ptx.splitlines() if not line.lstrip().startswith("//"))
    assert f".target sm_{capability[0]}{capability[1]}\n" in code
    assert (".shfl" in code or "shfl.sync" in code) == (name.split()[0] in SHUFFLES)
    assert ("bar.sync" in code) == (name.split()[0] in SHUFFLES - {"gemv"} | {"gemm"})
    has_double = re.search(r"\.f64\s", code) is not None
    assert has_double == name.startswith("sample"), "float64 arithmetic where float32 was meant"
    machine = ahead.to_machine_code(ptx, capability)
    assert machine.code.startswith(b"\x7fELF")
    assert (machine.stack_bytes, machine.spill_bytes) == (0, 0)
    assert 0 < machine.num_registers * MOST_THREADS <= REGISTERS  # so that a block fits
    assert machine.shared_bytes <= 16 * 1024


@pytest.mark.clause("BK-NCUDA-17", "BK-NCUDA-5")
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_kernels_compiles_without_spilling(name: str) -> None:
    """The capabilities take turns; the quick ones are compiled for both."""
    turn = SAMPLE.index(name) % 2
    for capability in (
        CAPABILITIES if name.split()[0] in ("rms_norm", "copy_rows", *DECODE) else CAPABILITIES[turn : turn + 1]
    ):
        check(name, ALL[name], capability)


@pytest.mark.slow
@pytest.mark.clause("BK-NCUDA-17")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", list(ALL))
def test_every_kernel_compiles_without_spilling(name: str, capability: tuple[int, int]) -> None:
    check(name, ALL[name], capability)


@pytest.mark.clause("BK-NCUDA-17")
def test_the_sample_has_every_kind_of_kernel_and_names_are_different() -> None:
    assert len(ALL) == len(list(kernels()))
    alike = {"rms_norm_residual", "copy_runs", "fill"}  # of rms_norm and copy_rows
    assert {name.split()[0] for name in ALL} == {name.split()[0] for name in SAMPLE} | alike


@pytest.mark.clause("BK-NCUDA-17")
def test_what_does_not_compile_is_told() -> None:
    @kernel("float32[::1]")
    def unknown(out: object) -> None:
        out[0] = nowhere  # type: ignore[index]  # noqa: F821

    with pytest.raises(BackendError, match=r"to_ptx: unknown\(float32\[::1\]\) for \(9, 0\)"):
        ahead.to_ptx(unknown, (9, 0))
    with pytest.raises(BackendError, match="to_machine_code: sm_90"):
        ahead.to_machine_code("no PTX", (9, 0))
