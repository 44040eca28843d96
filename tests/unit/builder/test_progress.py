"""Reports of a build, and how long it is said to take."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.builder import DecoderModelBuilder
from ferrum_ref.builder.estimate import Rates, SamplingMeter, Workload, estimate
from ferrum_ref.builder.progress import BuildReporter
from ferrum_ref.errors import CancelledError, ConfigError, FerrumIOError, FerrumTimeoutError, InvalidParameterError
from ferrum_ref.interfaces.model_builder import BuildPhase, BuildProgress
from ferrum_ref.types.devices import DataType
from ferrum_ref.types.models import QuantizationConfig


@pytest.mark.clause("MB-PROGRESS-1", "MB-DATA-2")
def test_reports_of_a_whole_build(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any
) -> None:
    model = saved(1)
    reports: list[BuildProgress] = []
    executor = run(builder.build_incremental(model.config(), backend, loader, reports.append))
    fractions = [report.progress for report in reports]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    phases = list(dict.fromkeys(report.phase for report in reports))
    assert phases == list(BuildPhase)
    assert [report.phase for report in reports] == sorted((r.phase for r in reports), key=list(BuildPhase).index)
    layers = [report.phase_details["layers_done"] for report in reports if "layers_done" in report.phase_details]
    assert sorted(layers) == [1, 2, 3]
    assert all(report.current_operation for report in reports)
    assert reports[-1].remaining_seconds == 0
    assert model.error(prompt_logits(executor, model.ids)) <= model.bound


@pytest.mark.clause("MB-PROGRESS-3")
@pytest.mark.parametrize("at", list(BuildPhase))
def test_an_exception_of_the_listener_ends_the_build(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, at: BuildPhase
) -> None:
    class Enough(Exception):
        """The listener's own."""

    seen: list[BuildPhase] = []

    def listen(report: BuildProgress) -> None:
        seen.append(report.phase)
        if report.phase is at:
            raise Enough

    with pytest.raises(Enough):
        run(builder.build_incremental(saved(1).config(), backend, loader, listen))
    assert seen[-1] is at or at is BuildPhase.WeightLoading  # two threads read weights


@pytest.mark.clause("MB-PROGRESS-2")
def test_elapsed_and_remaining() -> None:
    now = [100.0]
    reports: list[BuildProgress] = []
    reporter = BuildReporter(lambda: now[0], reports.append)
    for seconds, phase, done in (
        (0.0, BuildPhase.Validation, 1.0),
        (9.9, BuildPhase.WeightLoading, 0.5),
        (20.0, BuildPhase.Finalization, 1.0),
    ):
        now[0] = 100.0 + seconds
        reporter.report(phase, "x", done)
    assert [report.elapsed_seconds for report in reports] == [0, 9, 20]
    assert [report.remaining_seconds for report in reports] == [None, math.ceil(9.9 * 0.58 / 0.42), 0]
    assert [report.progress for report in reports] == pytest.approx([0.02, 0.42, 1.0])


@pytest.mark.clause("MB-PROGRESS-1")
@given(st.lists(st.tuples(st.sampled_from(list(BuildPhase)), st.floats(-1, 2)), min_size=1, max_size=30))
def test_reports_in_any_order_never_fall(calls: Any) -> None:
    reports: list[BuildProgress] = []
    reporter = BuildReporter(lambda: 0.0, reports.append)
    for phase, done in calls:
        reporter.report(phase, "x", done)
    fractions = [report.progress for report in reports]
    assert fractions == sorted(fractions)
    order = [list(BuildPhase).index(report.phase) for report in reports]
    assert order == sorted(order)
    assert all(0 <= fraction <= 1 for fraction in fractions)


@pytest.mark.clause("MB-PROGRESS-1")
def test_reports_of_many_threads_are_in_order() -> None:
    reports: list[BuildProgress] = []
    reporter = BuildReporter(lambda: 0.0, reports.append)

    def work(part: int) -> None:
        for step in range(50):
            reporter.report(BuildPhase.WeightLoading, "x", (step * 4 + part) / 200)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fractions = [report.progress for report in reports]
    assert len(fractions) == 200
    assert fractions == sorted(fractions)


@pytest.mark.clause("MB-OPTIONS-4")
def test_a_stopped_build_goes_no_further() -> None:
    now = [0.0]
    reporter = BuildReporter(lambda: now[0], None, 5)
    reporter.require_time()
    now[0] = 5.0
    with pytest.raises(FerrumTimeoutError, match="not done after 5 s"):
        reporter.report(BuildPhase.WeightLoading, "x")
    other = BuildReporter(lambda: now[0], None, None)
    other.stop()
    with pytest.raises(CancelledError):
        other.require_time()


@pytest.mark.clause("MB-DATA-3")
def test_progress_is_a_fraction() -> None:
    report = BuildProgress(BuildPhase.Validation, 0.5, "x", 1, None, {})
    assert report.progress == 0.5
    for wrong in (50.0, -0.1, 1.0000001, math.nan):
        with pytest.raises(InvalidParameterError, match="fraction"):
            dataclasses.replace(report, progress=wrong)


RATES = Rates(1e6, 2e6, 0.5e6, 4e6, True)
WORK = Workload(
    file_bytes=10_500_000, num_elements=3_000_000, parameter_bytes=12_000_000, cache_bytes=6_000_000, num_threads=2,
    converts=True, quantizes=False,
)  # fmt: skip


@pytest.mark.clause("MB-ESTIMATE-1", "MB-ESTIMATE-2", "MB-ESTIMATE-4")
def test_an_estimate_by_hand() -> None:
    """10.5 s of reading + 3e6 / (2e6 * 2) = 0.75 s of converting; 1.5 s of cache; 3 s for a token: 15.75 s."""
    found = estimate(WORK, RATES)
    assert (found.min_time_seconds, found.expected_time_seconds, found.max_time_seconds) == (7, 16, 48)
    parts = found.time_breakdown
    assert (parts.weight_loading_seconds, parts.model_init_seconds, parts.optimization_seconds) == (11, 1, 0)
    assert (parts.validation_seconds, parts.overhead_seconds) == (3, 1)
    impacts = {factor.factor: factor.impact for factor in found.factors}
    assert impacts == {"threads": 0.5, "quantization": 1.0, "conversion": 1.0, "spread": 3.0, "read_rate": 1.0}
    assert all(factor.description for factor in found.factors)


@pytest.mark.clause("MB-ESTIMATE-1", "MB-ESTIMATE-4")
def test_quantising_takes_its_own_time() -> None:
    """3e6 / (0.5e6 * 2) = 3 s in place of 0.75 s."""
    found = estimate(dataclasses.replace(WORK, quantizes=True), RATES)
    assert (found.expected_time_seconds, found.time_breakdown.weight_loading_seconds) == (18, 13)
    assert {factor.factor: factor.impact for factor in found.factors}["quantization"] == 4.0
    as_stored = estimate(dataclasses.replace(WORK, converts=False), RATES)
    assert as_stored.expected_time_seconds == 15


@pytest.mark.clause("MB-ESTIMATE-2")
@given(
    st.integers(0, 10**13), st.integers(0, 10**12), st.integers(0, 10**12), st.integers(1, 64), st.booleans(),
    st.floats(1e3, 1e11),
)  # fmt: skip
def test_sums_and_order(size: int, elements: int, cache: int, threads: int, quantizes: bool, rate: float) -> None:
    work = Workload(size, elements, 4 * elements, cache, threads, True, quantizes)
    found = estimate(work, Rates(rate, rate, rate / 3, rate, True))
    parts = dataclasses.astuple(found.time_breakdown)
    assert sum(parts) == found.expected_time_seconds
    assert min(parts) >= 0
    assert found.min_time_seconds <= found.expected_time_seconds <= found.max_time_seconds


@pytest.mark.clause("MB-ESTIMATE-3")
def test_rates_are_measured(tmp_path: Path) -> None:
    """A clock that advances 0.5 s in each measurement, whatever is done in it."""
    ticks = iter(np.arange(0, 100, 0.5))
    path = tmp_path / "weights"
    path.write_bytes(bytes(3000))
    rates = SamplingMeter(lambda: float(next(ticks)), sample_bytes=1000).measure([path])
    assert rates == Rates(1000 / 0.5, 500 / 0.5, 500 / 0.5, 1000 / 0.5, True)
    path.write_bytes(bytes(100))
    assert SamplingMeter(lambda: float(next(ticks)), sample_bytes=1000).measure([path]).read_bytes_per_s == 200
    nowhere = SamplingMeter(sample_bytes=1000).measure([])
    assert (nowhere.read_bytes_per_s, nowhere.is_measured) == (100 * 2**20, False)
    with pytest.raises(FerrumIOError, match="absent"):
        SamplingMeter(sample_bytes=1000).measure([tmp_path / "absent"])


class FixedMeter:
    """Rates that are given, and the files it was asked about."""

    def __init__(self) -> None:
        self.files: list[Path] = []

    def measure(self, files: list[Path]) -> Rates:
        self.files = files
        return Rates(1000.0, 1e12, 1e12, 1e12, bool(files))


@pytest.mark.clause("MB-ESTIMATE-1", "MB-ESTIMATE-3")
def test_the_models_own_files_count(saved: Any, run: Any) -> None:
    meter = FixedMeter()
    builder = DecoderModelBuilder(meter=meter)
    for shards in (None, "12KB"):
        model = saved(1, shards)
        found = run(builder.estimate_build_time(model.config()))
        files = sorted(model.path.glob("*.safetensors"))
        assert meter.files == files
        size = sum(path.stat().st_size for path in files)
        assert found.expected_time_seconds == math.ceil(size / 1000 + 1e-6)
    config = json.loads((model.path / "config.json").read_text())
    nowhere = dataclasses.replace(
        model.config(), model_path="nowhere", dtype=DataType.FP16, extra_config={"config": config}
    )
    found = run(builder.estimate_build_time(nowhere))
    num_elements = sum(values.size for values in model.tiny.tensors.values())
    assert found.expected_time_seconds == math.ceil(2 * num_elements / 1000)
    assert "assumed" in {factor.factor: factor.description for factor in found.factors}["read_rate"]
    quantised = run(builder.estimate_build_time(model.config(quantization=QuantizationConfig.FP8(True, False))))
    assert {factor.factor: factor.impact for factor in quantised.factors}["quantization"] == 1.0
    with pytest.raises(ConfigError):
        run(builder.estimate_build_time(dataclasses.replace(model.config(), dtype=DataType.INT8)))


@pytest.mark.clause("MB-ESTIMATE-1")
def test_a_real_estimate_is_no_constant(saved: Any, builder: Any, run: Any) -> None:
    """Upstream says 3 s for everything; a thousand times the cache takes longer to fill than one."""
    model = saved(1)
    small = run(builder.estimate_build_time(model.config()))
    large = run(builder.estimate_build_time(model.config(extra_config={"num_blocks": 10_000_000})))
    assert small.expected_time_seconds <= 5
    assert large.expected_time_seconds > small.expected_time_seconds
