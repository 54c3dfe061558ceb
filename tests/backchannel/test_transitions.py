"""The states of a job: which follow which, and that no statement skips one."""

from __future__ import annotations

import pytest

from backchannel import transitions
from backchannel.tables import FOLLOWS, STATES, TERMINAL


def test_each_state_says_which_follow_and_a_terminal_one_has_none() -> None:
    assert set(FOLLOWS) == set(STATES)
    assert {state for state, next_ in FOLLOWS.items() if not next_} == TERMINAL


@pytest.mark.parametrize(
    ("here", "there"), [(a, b) for a in STATES for b in STATES if b not in FOLLOWS[a]]
)
def test_no_statement_can_be_made_for_a_move_that_does_not_follow(here: str, there: str) -> None:
    with pytest.raises(AssertionError, match="does not follow"):
        transitions.move(here, there)
