"""Python's search for garbage cycles, in processes that live long and hold much in flight."""

from __future__ import annotations

import gc

# By default the young are searched at every 700th, and all that lives whenever that has grown by a
# quarter. With 1,000 streams in flight the searches took 7 % of a worker's time and stood still
# for a quarter of a second, and found nothing: nothing that a job leaves behind is a cycle. Now the
# young are searched at every 10,000th, in 5 ms; what they leave, after ten times; all, after a
# thousand. More rarely is hardly cheaper, and what failed with a megabyte each is held longer.
OFTEN = (10_000, 10, 100)


def settle() -> None:
    """What lives now lives for ever: search it once more, and never again. Later, search rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*OFTEN)
