"""The ids of everything: ordered by time, so that what is newer comes later in every list."""

from __future__ import annotations

import uuid

from uuid_utils.compat import uuid7


def new_id(kind: str) -> str:
    """A time-ordered id such as ``job_0192…``: 128 bits, uuid version 7 (RFC 9562)."""
    moment: uuid.UUID = uuid7()
    return f"{kind}_{moment.hex}"


def new_file_id() -> str:
    """A time-ordered id as OpenAI spells those of files."""
    return new_id("file").replace("_", "-")
