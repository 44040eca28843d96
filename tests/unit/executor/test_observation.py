"""Hidden states and attention weights against transformers in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.executor.observation import HiddenStates
from ferrum_ref.interfaces.model_executor import DecodeInput, PrefillInput


@pytest.fixture(scope="module")
def exact(judge7: Any, transformers_7: Any) -> Any:
    """transformers on 20 tokens: hidden states (4 of [20, E]) and attention weights (3 of [H, 20, 20])."""
    import torch

    with torch.no_grad():
        out = transformers_7("eager")(
            torch.tensor([judge7.ids[:20]]), output_hidden_states=True, output_attentions=True
        )
    return [h[0].numpy() for h in out.hidden_states], [a[0].numpy() for a in out.attentions]


def close(found: Any, right: Any) -> bool:
    """Within float32's rounding of three layers: 2**-24 times a few hundred operations, relative to the largest."""
    return bool(np.abs(found - right).max() <= 400 * 2.0**-24 * max(1.0, np.abs(right).max()))


@pytest.mark.clause("MX-OUTPUT-4", "MX-OUTPUT-5")
def test_prefill_tells_states_and_weights(judge7: Any, run: Any, tensor: Any, exact: Any) -> None:
    executor, _ = judge7.loaded.new_executor(20, 4)
    plain = PrefillInput.new(tensor(judge7.ids[:20]))
    output = run(executor.prefill(plain.with_hidden_states().with_attention_weights()))
    states, weights = exact
    assert [state.shape() for state in output.hidden_states] == [(1, 20, 32)] * 4
    assert [part.shape() for part in output.attention_weights] == [(1, 4, 20, 20)] * 3
    for found, right in zip(output.hidden_states, states, strict=True):
        assert close(found.to_numpy()[0], right)
    for found, right in zip(output.attention_weights, weights, strict=True):
        assert close(found.to_numpy()[0], right)
        np.testing.assert_allclose(found.to_numpy().sum(axis=-1), 1.0, rtol=1e-5)
    silent = run(executor.prefill(plain))
    assert (silent.hidden_states, silent.attention_weights) == (None, None)
    np.testing.assert_array_equal(silent.logits.to_numpy(), output.logits.to_numpy())
    last = run(executor.prefill(plain.with_hidden_states().with_last_only()))
    assert last.logits.shape() == (1, 1, 97)
    assert judge7.right(last.logits.to_numpy(), judge7.ids[:20])
    assert last.hidden_states[3].shape() == (1, 20, 32)


@pytest.mark.clause("MX-OUTPUT-4", "MX-OUTPUT-5")
def test_chunks_and_decodes_tell_theirs(judge7: Any, run: Any, tensor: Any, exact: Any) -> None:
    executor, _ = judge7.loaded.new_executor(20, 4)
    states, weights = exact
    handle = run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:12])))).kv_cache
    chunk = PrefillInput.new(tensor(judge7.ids[12:17])).with_kv_cache(handle).with_hidden_states()
    output = run(executor.prefill(chunk.with_attention_weights()))
    assert close(output.hidden_states[2].to_numpy()[0], states[2][12:17])
    assert close(output.attention_weights[1].to_numpy()[0], weights[1][:, 12:17, :17])
    step = DecodeInput.new(tensor([judge7.ids[17]]), handle)
    silent = DecodeInput.new(tensor([[judge7.ids[18]]]), handle)
    told = run(executor.decode(step.with_hidden_states().with_attention_weights()))
    assert told.hidden_state.shape() == (1, 32)
    assert close(told.hidden_state.to_numpy()[0], states[3][17])
    assert [part.shape() for part in told.attention_weights] == [(1, 4, 1, 18)] * 3
    assert close(told.attention_weights[2].to_numpy()[0], weights[2][:, 17:18, :18])
    untold = run(executor.decode(silent))
    assert (untold.hidden_state, untold.attention_weights) == (None, None)


@pytest.mark.clause("MX-OUTPUT-4", "MX-OUTPUT-5", "MX-OUTPUT-6")
def test_each_row_and_each_input_gets_its_own(judge7: Any, run: Any, tensor: Any, exact: Any) -> None:
    """A left-padded and a whole row beside an input that asks for nothing."""
    executor, _ = judge7.loaded.new_executor(40, 4)
    states, weights = exact
    table = np.zeros((2, 10), int)
    table[0, 4:], table[1] = judge7.ids[:6], judge7.ids[:10]
    mask = (np.arange(10) >= [[4], [0]]).astype(int)
    asked = PrefillInput.new(tensor(table)).with_attention_mask(tensor(mask)).with_hidden_states()
    silent = PrefillInput.new(tensor(judge7.ids[:3]))
    first, second = run(executor.batch_prefill([silent, asked.with_attention_weights()]))
    assert (first.hidden_states, first.attention_weights) == (None, None)
    assert judge7.right(first.last_token_logits().to_numpy(), judge7.ids[:3])
    for found, right in zip(second.hidden_states, states, strict=True):
        values = found.to_numpy()
        assert values.shape == (2, 10, 32)
        assert (values[0, :4] == 0).all()
        assert close(values[0, 4:], right[:6])
        assert close(values[1], right[:10])
    for found, right in zip(second.attention_weights, weights, strict=True):
        values = found.to_numpy()
        assert values.shape == (2, 4, 10, 10)
        assert (values[0, :, :4] == 0).all()
        assert (values[0, :, :, 6:] == 0).all()
        assert close(values[0, :, 4:, :6], right[:, :6, :6])
        assert close(values[1], right[:, :10, :10])
    decoded = run(executor.decode(DecodeInput.new(tensor([[1], [2]]), second.kv_cache).with_attention_weights()))
    values = decoded.attention_weights[0].to_numpy()
    assert values.shape == (2, 4, 1, 11)
    assert (values[0, :, :, 7:] == 0).all()
    np.testing.assert_allclose(values.sum(axis=-1), 1.0, rtol=1e-5)


@pytest.mark.clause("MX-OUTPUT-4")
def test_a_decoder_that_reports_nothing_is_named() -> None:
    listener = HiddenStates(2)
    listener("embedding", None)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"layers\.0\.hidden"):
        listener.states()
