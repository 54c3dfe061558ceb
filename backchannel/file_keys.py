"""An upload's Idempotency-Key: settled when the upload is whole, kept as long as its file.

Each is a row among the files that nobody is shown. Its id is made of the caller and the key, so
that there can be only one; ``filename`` is the file it stands for, ``purpose`` a digest of what was
sent. A key is not taken when an upload begins: whoever broke off must be able to send it again.
"""

from __future__ import annotations

import hashlib

from sqlalchemy import Connection, bindparam, delete, exists, update
from sqlalchemy.dialects import postgresql, sqlite

from backchannel.db import now_ms
from backchannel.errors import key_mismatch
from backchannel.files import find
from backchannel.tables import files

KEY = "key"  # kind and status of such a row

_row = {
    "id": bindparam("key_id"),
    "caller": bindparam("who"),
    "kind": KEY,
    "status": KEY,
    "filename": bindparam("file"),
    "purpose": bindparam("digest"),
    "bytes": 0,
    "created_ms": now_ms(),
}
# a known key is left as it is, but locked: whoever comes second waits for the first one's commit
_TAKE = {
    dialect: make(files)
    .values(_row)
    .on_conflict_do_update(index_elements=["id"], set_={"kind": KEY})
    .returning(files.c.filename, files.c.purpose)
    for dialect, make in (("sqlite", sqlite.insert), ("postgresql", postgresql.insert))
}
_TAKE_OVER = (
    update(files)
    .where(files.c.id == bindparam("key_id"))
    .values(filename=bindparam("file"), purpose=bindparam("digest"))
)


def settle(connection: Connection, caller: str, key: str, digest: str, file_id: str) -> str:
    """The file that a key stands for: this one, or the first that was sent with it.

    Raises:
        Conflict: The key was used for another upload.
    """
    key_id = f"key-{hashlib.sha256(f'{len(caller)} {caller} {key}'.encode()).hexdigest()}"
    own = {"key_id": key_id, "file": file_id, "digest": digest}
    known = connection.execute(_TAKE[connection.dialect.name], own | {"who": caller}).one()
    if known.filename == file_id:
        return file_id
    if find(connection, known.filename, caller) is None:  # deleted or expired: the key is free
        connection.execute(_TAKE_OVER, own)
        return file_id
    if known.purpose != digest:
        raise key_mismatch()
    return str(known.filename)


_kept = files.alias("kept")


def forget_free(connection: Connection) -> None:
    """Remove the keys whose files are gone."""
    gone = ~exists().where(_kept.c.id == files.c.filename)
    connection.execute(delete(files).where(files.c.kind == KEY, gone))
