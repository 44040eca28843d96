"""Damaged files of every kind: only named errors come out, on one line, quickly, in bounded memory."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ferrum_ref.errors import FerrumError
from ferrum_ref.models.checkpoint import open_checkpoint

NUMBERS = st.sampled_from([0, 1, 2, 31, 2**16, 2**31, 2**32 - 1, 2**61, 2**63, 2**64 - 1])
Damage = list[tuple[str, int, int]]


def damages(num_bytes: int, header_bytes: int) -> st.SearchStrategy[Damage]:
    """Flipped bits, overwritten counts, and cuts; most of them in the header."""
    place = st.one_of(st.integers(0, header_bytes - 1), st.integers(0, header_bytes - 1), st.integers(0, num_bytes - 1))
    return st.lists(
        st.one_of(
            st.tuples(st.just("flip"), place, st.integers(0, 7)),
            st.tuples(st.just("byte"), place, st.integers(0, 255)),
            st.tuples(st.just("u64"), place, NUMBERS),
            st.tuples(st.just("cut"), place, st.just(0)),
        ),
        min_size=1,
        max_size=4,
    )


def damaged(content: bytes, damage: Damage) -> bytes:
    found = bytearray(content)
    for kind, place, value in damage:
        if place >= len(found):
            continue
        if kind == "cut":
            del found[place:]
        elif kind == "u64":
            found[place : place + 8] = value.to_bytes(8, "little")[: len(found) - place]
        else:
            found[place] = found[place] ^ (1 << value) if kind == "flip" else value
    return bytes(found)


@contextmanager
def only_named_errors(limit_bytes: int) -> Iterator[None]:
    """Nothing but FerrumError, its text on one line of sensible length, within a memory limit."""
    message = ""
    tracemalloc.start()
    try:
        yield
    except FerrumError as error:
        message = str(error)
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert "\n" not in message
    assert len(message) < 800
    assert peak_bytes < limit_bytes


def read_all(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name)


HEADER_BYTES = 1800  # of the tiny GGUF: metadata and tensor table


@pytest.mark.clause("MD-GGUF-2", "MD-CKPT-2", "MD-CKPT-3")
@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_gguf(data: st.DataObject, tiny_gguf: Path, tmp_path: Path) -> None:
    content = tiny_gguf.read_bytes()
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged(content, data.draw(damages(len(content), HEADER_BYTES))))
    with only_named_errors(limit_bytes=8 * len(content) + 2**20):
        read_all(path)


@pytest.mark.clause("MD-GGUF-2")
def test_every_cut_of_a_gguf_header(tiny_gguf: Path, tmp_path: Path) -> None:
    content = tiny_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    for end in (*range(0, HEADER_BYTES, 7), len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(FerrumError):
            read_all(path)


@pytest.mark.clause("MD-SAFE-2", "MD-SAFE-3", "MD-CKPT-2")
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_safetensors(data: st.DataObject, single_directory: Path) -> None:
    weights, intact = single_directory / "model.safetensors", single_directory / "intact"
    content = intact.read_bytes()
    weights.write_bytes(damaged(content, data.draw(damages(len(content), 2000))))
    with only_named_errors(limit_bytes=8 * len(content) + 2**20):
        read_all(single_directory)


@pytest.mark.clause("MD-JSON-1", "MD-CONFIG-2", "MD-DIR-4")
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_json(name: str, data: st.DataObject, tiny_directory: Path, tmp_path: Path) -> None:
    directory = tmp_path / "hf"
    if not directory.exists():
        shutil.copytree(tiny_directory, directory)
    content = (tiny_directory / name).read_bytes()
    (directory / name).write_bytes(damaged(content, data.draw(damages(len(content), len(content)))))
    with only_named_errors(limit_bytes=2**22):
        read_all(directory)


@pytest.fixture
def single_directory(tmp_path: Path, make_llama: Callable[..., object]) -> Path:
    """One weight file, and an intact copy of it under another name."""
    model = make_llama(num_hidden_layers=1, vocab_size=8)
    model.save_pretrained(tmp_path / "single")  # type: ignore[attr-defined]
    shutil.copy(tmp_path / "single" / "model.safetensors", tmp_path / "single" / "intact")
    return tmp_path / "single"
