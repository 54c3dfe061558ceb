"""The chaos suite: real processes are killed, frozen and starved, and the promises are counted."""
