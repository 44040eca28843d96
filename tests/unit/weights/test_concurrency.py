"""Loads that overlap: one fetch for all who wait, no more connections than allowed, every waiter gets the error."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import NotFoundError
from ferrum_ref.interfaces.weights import WeightSource
from ferrum_ref.weights.single_flight import SingleFlight

Make = Callable[..., Any]


@pytest.mark.clause("WL-LOAD-9")
@pytest.mark.parametrize("caching", [True, False])
def test_one_fetch_for_all_who_wait(
    caching: bool, site: Any, make_loader: Make, spec: Make, safetensors: Make, values: Any
) -> None:
    site.files["w.safetensors"], site.gate = safetensors(w=values), threading.Event()
    loader = make_loader(enable_caching=caching)
    source = WeightSource.Url(site.url("w.safetensors"), {})

    async def go() -> list[Any]:
        loads = [asyncio.create_task(loader.load_tensor(spec(source, values.shape))) for _ in range(4)]
        await asyncio.sleep(0.2)
        site.gate.set()
        return await asyncio.gather(*loads)

    for tensor in asyncio.run(go()):
        np.testing.assert_array_equal(tensor.to_numpy(), values)
    assert len(site.log) == 1


@pytest.mark.clause("WL-LOAD-9")
def test_one_fetch_for_the_tensors_of_a_call(
    site: Any, make_loader: Make, spec: Make, safetensors: Make, values: Any
) -> None:
    site.files["w.safetensors"] = safetensors(a=values, b=values + 1, c=values + 2)
    loader = make_loader(enable_caching=False, max_concurrent_downloads=1)
    source = WeightSource.Url(site.url("w.safetensors"), {})
    found = asyncio.run(loader.load_tensors([spec(source, values.shape, name=name) for name in "abcab"]))
    for tensor, offset in zip(found, (0, 1, 2, 0, 1), strict=True):
        np.testing.assert_array_equal(tensor.to_numpy(), values + offset)
    assert len(site.log) == 1


@pytest.mark.clause("WL-LOAD-9")
@pytest.mark.parametrize("most", [1, 2])
def test_no_more_downloads_at_once_than_allowed(
    most: int, site: Any, make_loader: Make, spec: Make, safetensors: Make, values: Any
) -> None:
    running = [0, 0]
    lock = threading.Lock()
    content = safetensors(w=values)

    class Counting(dict[str, bytes]):
        def __getitem__(self, name: str) -> bytes:
            with lock:
                running[0] += 1
                running[1] = max(running)
            threading.Event().wait(0.03)
            with lock:
                running[0] -= 1
            return content

        def __contains__(self, name: object) -> bool:
            return True

    site.files = Counting()
    loader = make_loader(max_concurrent_downloads=most)

    async def go() -> None:
        sources = [WeightSource.Url(site.url(f"{number}.safetensors"), {}) for number in range(6)]
        await asyncio.gather(*(loader.load_tensor(spec(source, values.shape)) for source in sources))

    asyncio.run(go())
    assert running[1] == most
    assert len(site.log) == 6


@pytest.mark.clause("WL-LOAD-9")
def test_every_waiter_gets_the_error_and_the_next_call_tries_again(
    site: Any, make_loader: Make, spec: Make, load: Make, safetensors: Make, values: Any
) -> None:
    site.gate = threading.Event()
    loader = make_loader()
    source = WeightSource.Url(site.url("w.safetensors"), {})

    async def go() -> list[Any]:
        loads = [asyncio.create_task(loader.load_tensor(spec(source, values.shape))) for _ in range(3)]
        await asyncio.sleep(0.1)
        site.gate.set()
        return await asyncio.gather(*loads, return_exceptions=True)

    assert all(isinstance(result, NotFoundError) for result in asyncio.run(go()))
    assert len(site.log) == 1
    site.files["w.safetensors"] = safetensors(w=values)
    np.testing.assert_array_equal(load(loader, spec(source, values.shape)), values)


@pytest.mark.clause("WL-LOAD-9")
def test_single_flight() -> None:
    flights: SingleFlight[int] = SingleFlight()
    assert [flights.run("a", lambda: 1), flights.run("a", lambda: 2)] == [1, 2]
    with pytest.raises(KeyError):
        flights.run("a", lambda: {}["x"])
    assert flights.run("a", lambda: flights.run("b", lambda: 3)) == 3
