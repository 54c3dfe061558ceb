"""The search for garbage, in a process of its own: it is a setting of the whole process."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import gc
from backchannel.garbage import settle

class Knot: pass

knot = Knot(); knot.itself = knot; del knot
before = gc.get_freeze_count()
settle()
assert not any(isinstance(each, Knot) for each in gc.get_objects()), "old garbage is gone"
assert gc.get_freeze_count() > before + 1000, "what lives is left alone"
searches = gc.get_stats()[0]["collections"]
kept = [[] for _ in range(10_000)]
assert gc.get_stats()[0]["collections"] - searches <= 1, "the young are searched rarely"
knot = Knot(); knot.itself = knot; del knot
kept = [[] for _ in range(100_000)]
assert not any(isinstance(each, Knot) for each in gc.get_objects()), "new garbage goes too"
"""


def test_what_lives_is_searched_once_and_new_garbage_now_and_then() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True)
