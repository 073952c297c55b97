from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.runtime.text import StopFinder

_letters = st.text(alphabet="ab", max_size=12)


@given(st.lists(_letters, max_size=6), st.lists(st.text(alphabet="ab", min_size=1, max_size=4)))
def test_text_ends_before_the_first_stop_however_it_is_cut(
    pieces: list[str], stops: list[str]
) -> None:
    finder = StopFinder(stops)
    shown = "".join(finder.feed(piece) for piece in pieces) + finder.rest()
    # The first stop to be complete decides; of several at once, the one that began first.
    whole, expected, found = "", "", False
    for piece in pieces:
        whole += piece
        begins = [at for stop in stops if (at := whole.find(stop)) >= 0]
        if begins:
            expected, found = whole[: min(begins)], True
            break
        expected = whole
    assert shown == expected
    assert finder.found == found


def test_text_is_held_back_only_while_it_can_become_a_stop() -> None:
    finder = StopFinder(["</end>"])
    assert finder.feed("a <") == "a "
    assert finder.feed("/en") == ""
    assert finder.feed("t") == "</ent"
    assert finder.feed("x</end") == "x"
    assert finder.feed("> more") == ""
    assert finder.found
    assert finder.feed("y") == finder.rest() == ""
