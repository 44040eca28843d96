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
        "rms_norm_residual fp32 fp32",
        "layer_norm fp16 fp32",
        "softmax bf16",
        "unary gelu fp16 fp16",
        "binary silu_mul bf16 bf16 bf16",
    ),
    *(
        "rotary_embedding bf16 fp32",
        "gather_strided uint16",
        "scatter_strided uint8",
        "copy_rows uint32",
        "argmax bf16",
        "gemm bf16 bf16",
    ),
    *(
        "gemv fp16 fp32",
        "packed_gemv bf16 q4_0",
        "packed_gemv fp32 q8_0",
        "attention bf16",
        "attend_one bf16 2",
        "merge bf16",
        "sample fp32",
    ),
    *("place_cursor", "turn_and_store bf16 bf16"),
)
DECODE = ("place_cursor", "turn_and_store")
SHUFFLES = {
    *("rms_norm", "rms_norm_residual", "layer_norm", "softmax", "argmax", "gemv", "packed_gemv"),
    *("attention", "attend_one", "sample"),
}
NO_BARRIER = {"gemv", "packed_gemv"}
# 16-byte accesses of a body for 16-bit elements: loads that are under way before any arithmetic, and stores
IN_FLIGHT = {
    "rms_norm": (4, 2),
    "rms_norm_residual": (6, 4),
    "layer_norm": (2, 2),
    "rotary_embedding": (4, 2),
    "unary": (1, 1),
    "binary": (2, 1),
    "gemv": (4, 0),
    "packed_gemv": (2, 0),
    "attend_one": (8, 0),
}
COPIES = {"packed_gemv bf16 q4_0": 4, "packed_gemv bf16 q8_0": 2}  # rows of W that a warp copies at once, at least


def check(name: str, made: Kernel, capability: tuple[int, int]) -> None:
    ptx = ahead.to_ptx(made, capability)
    code = "\n".join(line for line in ptx.splitlines() if not line.lstrip().startswith("//"))
    assert f".target sm_{capability[0]}{capability[1]}\n" in code
    assert (".shfl" in code or "shfl.sync" in code) == (name.split()[0] in SHUFFLES)
    assert ("bar.sync" in code) == (name.split()[0] in SHUFFLES - NO_BARRIER | {"gemm"})
    check_width(name, code)
    has_double = re.search(r"\.f64\s", code) is not None
    assert has_double == name.startswith("sample"), "float64 arithmetic where float32 was meant"
    machine = ahead.to_machine_code(ptx, capability)
    assert machine.code.startswith(b"\x7fELF")
    assert (machine.stack_bytes, machine.spill_bytes) == (0, 0)
    assert 0 < machine.num_registers * MOST_THREADS <= REGISTERS  # so that a block fits
    assert machine.shared_bytes <= (37 if name.startswith("packed_gemv") else 16) * 1024


def check_width(name: str, code: str) -> None:
    """Vectors of 16 bytes, as many loads of them one after the other as IN_FLIGHT says, and no local memory."""
    assert re.search(r"\b(ld|st)\.local\b", code) is None
    made, storage = name.split()[0], name.split()[1] if " " in name else ""
    if made not in IN_FLIGHT or name.startswith("unary cast"):
        return
    loads, stores = IN_FLIGHT[made]
    per_pack = 2 if storage == "fp32" else 1
    runs = [
        re.findall(r"ld\.global\.v4\.[uf]32", run)
        for run in re.split(r"\b(?:fma|mul|add|sub|div|ex2)\.[a-z.]*f32", code)
    ]
    assert max(len(run) for run in runs) >= loads * per_pack
    assert len(re.findall(r"st\.global\.v4\.[uf]32", code)) >= stores * per_pack
    if made == "packed_gemv":
        copies = len(re.findall(r"cp\.async\.cg\.shared\.global[.:\w]* \[%\w+\], \[%\w+\], 16;", code))
        assert copies >= 2 * COPIES[f"packed_gemv bf16 {name.split()[2]}"]
        assert code.count("cp.async.commit_group") >= 2
        order = re.findall(r"cp\.async\.wait_group|bar\.warp\.sync|ld\.shared", code)
        reads = order.count("ld.shared")
        assert order == ["cp.async.wait_group", "bar.warp.sync", *["ld.shared"] * reads, "bar.warp.sync"]


@pytest.mark.clause("BK-NCUDA-17", "BK-NCUDA-5", "BK-NCUDA-42", "BK-NCUDA-43", "BK-NCUDA-44")
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
    alike = {"copy_runs", "fill"}  # of copy_rows
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
