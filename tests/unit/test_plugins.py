"""Finding and loading backends: names, targets, and every way in which a plug-in can disappoint."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from ferrum_ref.errors import (
    AlreadyExistsError,
    BackendError,
    DeviceError,
    InvalidParameterError,
    NotFoundError,
    UnsupportedError,
)
from ferrum_ref.plugins import ENTRY_POINT_GROUP, BackendInfo, available_backends, backend_targets, load_backend

GOOD = """
from types import SimpleNamespace
from ferrum_ref.interfaces.backend import ComputeBackend

class Fake(ComputeBackend):
    def __init__(self, device): self.device = device
    def version(self): return "7.5"
    def capabilities(self): return SimpleNamespace(supported_devices=["cpu", "fake:0"])

Fake.__abstractmethods__ = frozenset()

def make_backend(device="cpu"): return Fake(device)
def make_mute(device="cpu"):
    fake = Fake(device)
    fake.capabilities = lambda: 1 / 0
    return fake
def make_nothing(device="cpu"): return None
def make_crash(device="cpu"): raise ValueError("no kernel image")
def make_refusal(device="cpu"): raise DeviceError(f"fake: device {device} is on fire")
def make_import(device="cpu"): import surely_absent_module

from ferrum_ref.errors import DeviceError
constant = 3
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a fresh importable module that holds the factories above."""
    name = "plugin_" + re.sub(r"\W", "_", request.node.name)
    (tmp_path / f"{name}.py").write_text(GOOD)
    (tmp_path / f"{name}_lacking.py").write_text("import surely_absent_module\n")
    (tmp_path / f"{name}_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for suffix in ("", "_lacking", "_broken"):
        sys.modules.pop(name + suffix, None)


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name=name, value=value, group=ENTRY_POINT_GROUP)


@pytest.mark.clause("BK-PLUGIN-1")
def test_the_shipped_backends_are_registered() -> None:
    targets = backend_targets()
    assert list(targets) == sorted(targets)
    assert targets["numpy"] == ("ferrum_ref.numpy_backend:make_backend",)
    assert targets["torch"] == ("ferrum_torch:make_backend",)


@pytest.mark.clause("BK-PLUGIN-1")
def test_reading_names_imports_nothing_and_merges_repeats() -> None:
    points = [point("b", "absent_b:make"), point("a", "absent_a:make"), point("b", "absent_b:make")]
    assert backend_targets(points) == {"a": ("absent_a:make",), "b": ("absent_b:make",)}


@pytest.mark.clause("BK-PLUGIN-2")
def test_load_by_name_passes_the_device_and_imports_no_other_backend(plugin: str) -> None:
    points = [point("fake", f"{plugin}:make_backend"), point("other", f"{plugin}_broken:make_backend")]
    first = load_backend("fake", "fake:0", points=points)
    assert first.device == "fake:0"  # type: ignore[attr-defined]
    assert load_backend("fake", points=points) is not first
    assert f"{plugin}_broken" not in sys.modules


@pytest.mark.clause("BK-PLUGIN-2")
def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(NotFoundError, match=r"'nmupy'.*expected one of: .*numpy, .*torch"):
        load_backend("nmupy")
    with pytest.raises(NotFoundError, match="expected one of: none"):
        load_backend("numpy", points=[])


@pytest.mark.clause("BK-PLUGIN-2")
def test_a_name_with_two_targets_is_refused_and_both_are_named(plugin: str) -> None:
    points = [point("fake", f"{plugin}:make_backend"), point("fake", "elsewhere:make_backend")]
    with pytest.raises(AlreadyExistsError, match=rf"elsewhere:make_backend, {plugin}:make_backend"):
        load_backend("fake", points=points)
    info = available_backends(points)["fake"]
    assert not info.available
    assert "several packages" in info.reason


@pytest.mark.clause("BK-PLUGIN-3")
def test_a_target_needs_no_entry_point(plugin: str) -> None:
    assert load_backend(f"{plugin}:make_backend", points=[]).version() == "7.5"
    assert load_backend(f"{plugin}:Fake", "x", points=[]).device == "x"  # type: ignore[attr-defined]


@pytest.mark.clause("BK-PLUGIN-3")
@pytest.mark.parametrize("target", [":make", "module:", "a:b:c", "../x:y", "a b:c", "a..b:c", ":"])
def test_a_malformed_target_is_refused(target: str) -> None:
    with pytest.raises(InvalidParameterError, match=r"expected 'package\.module:factory'"):
        load_backend(target)


@pytest.mark.clause("BK-PLUGIN-3")
def test_an_absent_module_or_factory_is_named(plugin: str) -> None:
    with pytest.raises(NotFoundError, match=r"module 'surely_absent_module\.inner'"):
        load_backend("surely_absent_module.inner:make")
    with pytest.raises(NotFoundError, match=rf"'make_backed', expected a callable in '{plugin}'"):
        load_backend(f"{plugin}:make_backed")


@pytest.mark.clause("BK-PLUGIN-4", "BK-PLUGIN-5")
def test_every_backend_is_described_and_no_failure_hides_another(plugin: str) -> None:
    points = [
        point("good", f"{plugin}:make_backend"),
        point("broken", f"{plugin}_broken:make"),
        point("lacking", f"{plugin}_lacking:make"),
        point("mute", f"{plugin}:make_mute"),
        point("refusing", f"{plugin}:make_refusal"),
    ]
    infos = available_backends(points)
    assert infos["good"] == BackendInfo("good", f"{plugin}:make_backend", True, "", "7.5", ("cpu", "fake:0"))
    assert [name for name, info in infos.items() if info.available] == ["good"]
    assert infos["refusing"].reason == "fake: device cpu is on fire"
    assert "surely_absent_module" in infos["lacking"].reason
    assert "ZeroDivisionError" in infos["broken"].reason
    assert "ZeroDivisionError" in infos["mute"].reason
    assert all(info.reason and not info.version and not info.devices for info in infos.values() if not info.available)


@pytest.mark.clause("BK-PLUGIN-4")
def test_the_shipped_backends_describe_themselves() -> None:
    infos = available_backends()
    assert infos["numpy"].available, infos["numpy"].reason
    assert "cpu" in infos["numpy"].devices
    assert infos["torch"].available, infos["torch"].reason
    assert "cpu" in infos["torch"].devices


@pytest.mark.clause("BK-PLUGIN-6")
@pytest.mark.parametrize("target", ["{}_lacking:make", "{}:make_import"])
def test_a_missing_dependency_is_unsupported_and_named(plugin: str, target: str) -> None:
    with pytest.raises(UnsupportedError, match="surely_absent_module is missing"):
        load_backend(target.format(plugin))


@pytest.mark.clause("BK-PLUGIN-6")
def test_a_named_error_of_the_factory_passes_unchanged(plugin: str) -> None:
    with pytest.raises(DeviceError, match=r"^Device error: fake: device fake:3 is on fire$"):
        load_backend(f"{plugin}:make_refusal", "fake:3")


@pytest.mark.clause("BK-PLUGIN-7")
@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        ("make_nothing", "returned NoneType, expected a ComputeBackend"),
        ("make_crash", "failed on device 'cpu' with ValueError: no kernel image"),
        ("constant", "is int, expected a callable"),
    ],
)
def test_a_faulty_factory_is_a_backend_error(plugin: str, factory: str, complaint: str) -> None:
    with pytest.raises(BackendError, match=complaint) as caught:
        load_backend(f"{plugin}:{factory}")
    assert plugin in str(caught.value)


@pytest.mark.clause("BK-PLUGIN-1", "BK-PLUGIN-6")
def test_importing_the_module_and_reading_names_loads_no_backend() -> None:
    program = (
        "import sys; from ferrum_ref.plugins import backend_targets; backend_targets(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'ferrum_torch', 'ferrum_ref.numpy_backend')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
