"""The forward without a cache against transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import (
    InvalidParameterError,
    ModelError,
    ResourceExhaustedError,
    ShapeError,
    UnsupportedError,
)
from ferrum_ref.executor.cacheless import TransientKv, attention_of


@pytest.fixture
def executor(judge7: Any) -> Any:
    return judge7.loaded.new_executor(4, 4)[0]


@pytest.mark.clause("MX-FORWARD-1")
@pytest.mark.parametrize("as_embeddings", [False, True])
def test_every_position_of_every_row(judge7: Any, executor: Any, run: Any, tensor: Any, as_embeddings: bool) -> None:
    rows = [judge7.ids[:20], judge7.ids[20:40], judge7.ids[40:60]]
    given = (
        tensor(judge7.tiny.tensors["model.embed_tokens.weight"][rows], np.float32) if as_embeddings else tensor(rows)
    )
    logits = run(executor.forward(given))
    assert logits.shape() == (3, 20, 97)
    for index, row in enumerate(rows):
        for at in range(20):
            assert judge7.right(logits.to_numpy()[index, at], row, at)
    assert executor.status().memory_usage.used_bytes == 0
    assert executor.status().memory_usage.peak_bytes == 0
    single = run(executor.forward(tensor(judge7.ids)))  # 60 tokens: more than the 16 that the blocks hold
    assert single.shape() == (1, 60, 97)
    assert judge7.right(single.to_numpy()[0, -1], judge7.ids)


@pytest.mark.clause("MX-FORWARD-2")
def test_what_forward_refuses(executor: Any, run: Any, tensor: Any) -> None:
    wrong: list[tuple[Any, type[Exception], str]] = [
        (tensor(3), ModelError, "input_ids"),
        (tensor(np.zeros((1, 1, 1, 1))), ModelError, "input_ids"),
        (tensor([]), ModelError, "empty"),
        (tensor(np.zeros((2, 0, 32)), np.float32), ModelError, "no token"),
        (tensor(np.zeros((1, 2, 31)), np.float32), ShapeError, "31"),
        (tensor([1, 97]), InvalidParameterError, "token id"),
        (tensor([1] * 97), ResourceExhaustedError, "context"),
    ]
    for given, error, text in wrong:
        with pytest.raises(error, match=text):
            run(executor.forward(given))
    assert executor.status().prefill_operations == 0


@pytest.mark.clause("MX-FORWARD-2")
def test_a_decoder_without_a_backend_is_named(judge7: Any) -> None:
    with pytest.raises(UnsupportedError, match="object gives no access"):
        attention_of(object(), "forward")
    attention, tensor_ops = attention_of(judge7.loaded.decoder, "forward")
    with pytest.raises(UnsupportedError, match="layer 1 attends"):
        TransientKv(attention, tensor_ops, [1]).attend(1, None, None)  # type: ignore[arg-type]
