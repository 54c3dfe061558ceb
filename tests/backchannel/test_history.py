"""Which turns are told within a budget: the newest, whole, and tools never without their call."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from backchannel.history import Turn, budget_of, fit
from backchannel.tokens import tokens_of

TOOL = {"role": "tool", "tool_call_id": "call_1", "content": "7"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def said(role: str, chars: int = 8) -> dict[str, Any]:
    return {"role": role, "content": "x" * chars}


def turn(chars: int = 8) -> Turn:
    return [said("user", chars), said("assistant", chars)]


CALLING: Turn = [said("user"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
ANSWERING: Turn = [TOOL, said("assistant")]

TURNS = st.lists(st.integers(0, 200).map(turn) | st.just(CALLING) | st.just(ANSWERING), max_size=12)
ALWAYS = st.sampled_from(
    [[said("user")], [said("system", 40), said("user")], [TOOL], [said("system"), TOOL]]
)


def test_a_budget_is_that_of_the_model_or_of_all() -> None:
    limits = {"max_tokens": 100, "models": {"echo:echo-1": 5}}
    assert budget_of(None, "echo:echo-1") is None
    assert budget_of(limits, "echo:echo-1") == 5
    assert budget_of(limits, "echo:other") == 100
    assert budget_of({"models": {"echo:echo-1": 5}}, "echo:other") is None


def test_the_oldest_turns_are_left_out_first_and_whole() -> None:
    old, new = turn(400), turn(8)
    asked = [said("user")]
    assert fit([old, new], asked, 10_000) == ([old, new], 0)
    assert fit([old, new], asked, tokens_of([*new, *asked])) == ([new], 1)
    assert fit([old, new], asked, tokens_of([*new, *asked]) - 1) == ([], 2)
    assert fit([old, new], asked, 1) == ([], 2)


def test_results_of_tools_are_told_with_the_turn_that_called_them_or_not_at_all() -> None:
    asked = [said("user")]
    assert fit([CALLING, ANSWERING], asked, tokens_of([*ANSWERING, *asked])) == ([], 2)
    # the new message is the result: without its call no provider would take it
    assert fit([turn(), CALLING], [TOOL], 1) == ([CALLING], 1)
    assert fit([CALLING, ANSWERING], [said("system"), TOOL], 1) == ([CALLING, ANSWERING], 0)


@given(TURNS, ALWAYS, st.integers(1, 1_000))
def test_what_is_told_is_the_longest_end_that_fits(
    turns: list[Turn], always: list[dict[str, Any]], budget: int
) -> None:
    told, dropped = fit(turns, always, budget)
    assert dropped == len(turns) - len(told)
    assert told == turns[dropped:]
    results = always[-1] is TOOL
    # a result is never told without the turn before it
    if dropped:
        assert not told or told[0] is not ANSWERING or dropped == 0
        assert told or not results
    left = budget - tokens_of([*always, *(message for turn in told for message in turn)])
    starts = [n for n, each in enumerate(turns) if each is not ANSWERING or n == 0]
    if left < 0 and told:
        assert results, "only what results of tools need goes over the budget"
        assert dropped == starts[-1]
    elif dropped:
        start = max(n for n in starts if n < dropped)
        assert left < sum(map(tokens_of, turns[start:dropped])), "an older turn would have fitted"
