"""Stop strings: examples, and independence of how the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.engine.stop import StopMatcher


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stops)
    out = [matcher.feed(piece) for piece in pieces]
    return [*out, "" if matcher.matched else matcher.flush()], matcher.matched


@pytest.mark.clause("EN-STOP-1", "EN-STOP-2")
def test_text_ends_before_the_stop_string_and_never_shows_a_part_of_it() -> None:
    assert run(["\n\n"], ["one\n", "two\n", "\nthree"]) == (["one", "\ntwo", "", ""], "\n\n")
    assert run(["STOP"], ["a S", "TO", "x"]) == (["a ", "", "STOx", ""], None)
    assert run(["STOP"], ["a STO"]) == (["a ", "STO"], None)
    assert run([], ["anything"]) == (["anything", ""], None)
    assert run(["STOP"], ["STOP", "more"]) == (["", "", ""], "STOP")


@pytest.mark.clause("EN-STOP-3")
def test_the_string_that_ends_first_wins() -> None:
    assert run(["abc", "b"], ["xabc"]) == (["xa", ""], "b")
    assert run(["c", "bc"], ["abc"]) == (["a", ""], "bc")
    assert run(["aab"], ["aa", "ab"]) == (["", "a", ""], "aab")


text = st.text(alphabet="abc", max_size=14)


def reference(stops: list[str], whole: str) -> tuple[str, bool]:
    """Reading one character at a time and looking at the whole text each time."""
    for end in range(1, len(whole) + 1):
        starts = [end - len(s) for s in stops if whole[:end].endswith(s)]
        if starts:
            return whole[: min(starts)], True
    return whole, False


@pytest.mark.clause("EN-STOP-1", "EN-STOP-2", "EN-STOP-3")
@given(st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3), st.lists(text, max_size=6))
def test_the_result_does_not_depend_on_the_pieces(stops: list[str], pieces: list[str]) -> None:
    out, matched = run(stops, pieces)
    expected, stopped = reference(stops, "".join(pieces))
    assert "".join(out) == expected
    assert (matched is not None) == stopped
    if not stopped:  # at each moment exactly the longest suffix that may yet become a stop string is held back
        for k in range(len(pieces) + 1):
            seen = "".join(pieces[:k])
            heads = [n for s in stops for n in range(1, len(s)) if seen.endswith(s[:n])]
            assert "".join(out[:k]) == seen[: len(seen) - max(heads, default=0)]
