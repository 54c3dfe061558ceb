"""Ids tell by themselves what is newer."""

from __future__ import annotations

from backchannel import ids


def test_ids_are_ordered_by_time() -> None:
    made = [ids.new_id("job") for _ in range(1000)]
    assert made == sorted(set(made))
    assert all(each.startswith("job_") and len(each) == 36 for each in made)
