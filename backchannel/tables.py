"""One class per table; the states of jobs and batches, and which follow which, as data.

Times are whole milliseconds since 1970-01-01 UTC (``_ms``), money is whole nano-dollars
(``_nanousd``): both databases keep integers exactly, and neither agrees with the other on more.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    ColumnElement,
    FromClause,
    Index,
    LargeBinary,
    Table,
    UniqueConstraint,
    literal_column,
    text,
)
from sqlmodel import Field, SQLModel

QUEUED = "queued"
RUNNING = "running"
SUCCEEDED = "succeeded"
FAILED = "failed"
CANCELLED = "cancelled"
EXPIRED = "expired"

TERMINAL = frozenset({SUCCEEDED, FAILED, CANCELLED, EXPIRED})
STATES = (QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED, EXPIRED)
FOLLOWS: dict[str, frozenset[str]] = {
    QUEUED: frozenset({RUNNING, CANCELLED, EXPIRED}),
    RUNNING: frozenset({QUEUED}) | TERMINAL,
    SUCCEEDED: frozenset(),
    FAILED: frozenset(),
    CANCELLED: frozenset(),
    EXPIRED: frozenset(),
}

# The states of a batch: OpenAI's own.
VALIDATING = "validating"
IN_PROGRESS = "in_progress"
FINALIZING = "finalizing"
COMPLETED = "completed"
CANCELLING = "cancelling"

BATCH_FOLLOWS: dict[str, frozenset[str]] = {
    VALIDATING: frozenset({IN_PROGRESS, FAILED, EXPIRED, CANCELLING}),
    IN_PROGRESS: frozenset({FINALIZING, CANCELLING}),
    FINALIZING: frozenset({COMPLETED, EXPIRED}),
    CANCELLING: frozenset({CANCELLED}),
    COMPLETED: frozenset(),
    FAILED: frozenset(),
    EXPIRED: frozenset(),
    CANCELLED: frozenset(),
}
BATCH_TERMINAL = frozenset(state for state, follows in BATCH_FOLLOWS.items() if not follows)

# The states of a webhook's delivery; a replay begins it anew.
PENDING = "pending"
DELIVERED = "delivered"
DEAD = "dead"

DELIVERY_FOLLOWS: dict[str, frozenset[str]] = {
    PENDING: frozenset({DELIVERED, DEAD}),
    DELIVERED: frozenset({PENDING}),
    DEAD: frozenset({PENDING}),
}
# What a session does with a message that comes while a turn is unfinished.
ENQUEUE = "enqueue"
REJECT = "reject"
INTERRUPT = "interrupt"

INTERACTIVE = "interactive"
BATCH = "batch"
LANES = (INTERACTIVE, BATCH)  # in the order they are served


def _big(*, null: bool = False, index: bool = False) -> Any:
    return Field(sa_column=Column(BigInteger, nullable=null, index=index))


class Job(SQLModel, table=True):
    """One chat job: where it stands. What was asked and answered is in the tables beside it."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("caller", "idempotency_key", name="uq_jobs_idempotency"),
        Index("ix_jobs_caller", "caller", "id"),
        Index(
            "ix_jobs_unrung",
            "lane",
            "caller",
            "rank",
            "id",
            sqlite_where=text("state = 'queued' AND rung_ms IS NULL"),
            postgresql_where=text("state = 'queued' AND rung_ms IS NULL"),
        ),
        Index(
            "ix_jobs_rung",
            "lane",
            "rung_ms",
            sqlite_where=text("state = 'queued' AND rung_ms IS NOT NULL"),
            postgresql_where=text("state = 'queued' AND rung_ms IS NOT NULL"),
        ),
        Index(
            "ix_jobs_cancelling",
            "cancel_ms",
            sqlite_where=text("state = 'queued' AND cancel_ms IS NOT NULL"),
            postgresql_where=text("state = 'queued' AND cancel_ms IS NOT NULL"),
        ),
        Index(
            "ix_jobs_deadline",
            "deadline_ms",
            sqlite_where=text("state = 'queued'"),
            postgresql_where=text("state = 'queued'"),
        ),
        Index(
            "ix_jobs_running",
            "lease_ms",
            sqlite_where=text("state = 'running'"),
            postgresql_where=text("state = 'running'"),
        ),
        Index(
            "ix_jobs_session",
            "session_id",
            "session_seq",
            sqlite_where=text("session_id IS NOT NULL"),
            postgresql_where=text("session_id IS NOT NULL"),
        ),
        Index(
            "ix_jobs_batch",
            "batch_id",
            sqlite_where=text("batch_id IS NOT NULL AND finished_ms IS NULL"),
            postgresql_where=text("batch_id IS NOT NULL AND finished_ms IS NULL"),
        ),
    )

    id: str = Field(primary_key=True)
    caller: str
    # the face it was asked through, and is read back through
    kind: str = Field(default="job", sa_column_kwargs={"server_default": "job"})
    idempotency_key: str | None = None
    request_hash: str
    state: str = QUEUED
    lane: str = INTERACTIVE
    provider: str
    model: str
    requested_model: str | None = None
    model_reason: str
    # provider:model, in the order in which they are asked when the one before does not answer
    fallbacks: list[str] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    fallback_from: str | None = None  # the first model, once another was asked in its place
    session_id: str | None = None
    session_seq: int | None = None  # of the job's first message in its session
    interrupted_by: str | None = None  # the job of the session that it was cancelled for
    turns_dropped: int | None = None  # of the session's, that did not fit its budget of tokens
    parent_id: str | None = None
    batch_id: str | None = None
    line: int | None = None  # of the batch's input file
    stream: bool = True
    meta: dict[str, str] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    created_ms: int = _big()
    run_ms: int = _big()  # not before
    deadline_ms: int = _big()
    rung_ms: int | None = _big(null=True)
    started_ms: int | None = _big(null=True)  # of the first attempt
    finished_ms: int | None = _big(null=True)
    cancel_ms: int | None = _big(null=True)
    rank: int = 1  # 0: ahead of the line, after a crash or a hand-back
    attempt: int = 0  # the fencing token
    retries: int = 0
    crashes: int = 0
    owner: str | None = None
    lease_ms: int | None = _big(null=True)
    finish_reason: str | None = None
    error_code: str | None = None
    error_message: str | None = None


class JobRequest(SQLModel, table=True):
    """What a job asks: apart from the job, so that a heartbeat does not rewrite a long prompt."""

    __tablename__ = "job_requests"

    job_id: str = Field(primary_key=True, foreign_key="jobs.id", ondelete="CASCADE")
    instructions: str | None = None  # of this job alone, in place of its session's
    messages: list[dict[str, Any]] = Field(sa_column=Column(JSON, nullable=False))
    parameters: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    # what a face must give back as it was sent, and no adapter needs
    asked: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))


class JobResult(SQLModel, table=True):
    """What a finished job answered, and the whole of its stream for replay."""

    __tablename__ = "job_results"

    job_id: str = Field(primary_key=True, foreign_key="jobs.id", ondelete="CASCADE")
    message: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    log: bytes = Field(sa_column=Column(LargeBinary, nullable=False))  # events.pack_log


class Attempt(SQLModel, table=True):
    """One try at a job by one worker process; the provider call is on record before it is made."""

    __tablename__ = "attempts"

    job_id: str = Field(primary_key=True, foreign_key="jobs.id", ondelete="CASCADE")
    attempt: int = Field(primary_key=True)
    owner: str
    started_ms: int = _big()
    provider_call_ms: int | None = _big(null=True)
    finished_ms: int | None = _big(null=True)
    outcome: str | None = None  # a terminal state, or retried | fell_back | reaped | handed_back
    error_code: str | None = None
    error_message: str | None = None


class Usage(SQLModel, table=True):
    """What one attempt spent. ``input_tokens`` includes cached ones, ``output_tokens`` reasoning.

    Token counts are NULL when the source is ``unknown``: unknown is not zero. So is the cost when
    no price is known.
    """

    __tablename__ = "usage"
    __table_args__ = (
        Index(
            "uq_usage_billable",
            "job_id",
            unique=True,
            sqlite_where=text("billable"),
            postgresql_where=text("billable"),
        ),
        Index("ix_usage_caller", "caller", "created_ms"),
    )

    job_id: str = Field(primary_key=True, foreign_key="jobs.id", ondelete="CASCADE")
    attempt: int = Field(primary_key=True)
    billable: bool
    caller: str
    provider: str
    model: str
    model_reason: str | None = None
    session_id: str | None = None
    lane: str
    source: str  # final | partial | estimated | unknown
    input_tokens: int | None = _big(null=True)
    cached_tokens: int | None = _big(null=True)
    cache_write_tokens: int | None = _big(null=True)
    output_tokens: int | None = _big(null=True)
    reasoning_tokens: int | None = _big(null=True)
    cost_nanousd: int | None = _big(null=True)
    price_date: str | None = None  # the day whose price was taken, and from which price list
    created_ms: int = _big()


class ChatSession(SQLModel, table=True):
    """An ordered conversation and its current model."""

    __tablename__ = "sessions"
    __table_args__ = (Index("ix_sessions_caller", "caller", "id"),)

    id: str = Field(primary_key=True)
    caller: str
    title: str | None = None
    system: str | None = None  # said before every turn's history
    provider: str
    model: str
    model_rule: str | None = None  # a tier or auto: each turn's model is chosen by it
    model_version: int = 1  # counts switches
    last_seq: int = 0  # sequence numbers up to here are taken
    # what becomes of an unfinished turn when the next one comes
    double_texting: str = Field(default=ENQUEUE, sa_column_kwargs={"server_default": ENQUEUE})
    # {"max_tokens": …, "models": {"provider:model": …}}: see backchannel/history.py
    history: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    meta: dict[str, str] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    created_ms: int = _big()
    updated_ms: int = _big()


class Turn(SQLModel, table=True):
    """One message of a session; an answer's row is written in the job's finish transaction."""

    __tablename__ = "turns"

    session_id: str = Field(primary_key=True, foreign_key="sessions.id", ondelete="CASCADE")
    seq: int = Field(primary_key=True)
    job_id: str = Field(foreign_key="jobs.id", ondelete="CASCADE", index=True)
    message: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    provider: str | None = None  # of an answer
    model: str | None = None
    created_ms: int = _big()


class File(SQLModel, table=True):
    """An uploaded file; or a batch's output or errors, which are rendered from its lines."""

    __tablename__ = "files"
    __table_args__ = (Index("ix_files_caller", "caller", "id"),)

    id: str = Field(primary_key=True)
    caller: str
    kind: str  # input, or of a batch: output | error
    purpose: str
    filename: str
    status: str  # uploading, which nobody is shown, then processed
    bytes: int = _big()
    batch_id: str | None = None
    created_ms: int = _big()
    expires_ms: int | None = _big(null=True)


class FileChunk(SQLModel, table=True):
    """A piece of an uploaded file: whole lines, compressed. In the database, so that every API
    process and every worker machine can read it."""

    __tablename__ = "file_chunks"
    __table_args__ = (Index("ix_file_chunks_line", "file_id", "first_line"),)

    file_id: str = Field(primary_key=True, foreign_key="files.id", ondelete="CASCADE")
    n: int = Field(primary_key=True)  # from 0
    first_line: int  # counted from 1
    lines: int  # that end in it
    data: bytes = Field(sa_column=Column(LargeBinary, nullable=False))  # zlib


class Batch(SQLModel, table=True):
    """A file of chats to be answered: where it stands, and how far each of its steps has come."""

    __tablename__ = "batches"
    __table_args__ = (
        UniqueConstraint("caller", "idempotency_key", name="uq_batches_idempotency"),
        Index("ix_batches_caller", "caller", "id"),
        Index("ix_batches_input", "input_file_id"),
        Index(
            "ix_batches_live",
            "id",
            sqlite_where=text("ended_ms IS NULL"),
            postgresql_where=text("ended_ms IS NULL"),
        ),
    )

    id: str = Field(primary_key=True)
    caller: str
    idempotency_key: str | None = None
    request_hash: str
    endpoint: str
    completion_window: str
    input_file_id: str
    output_file_id: str | None = None
    error_file_id: str | None = None
    parent_id: str | None = None  # whose failed lines these are
    # what its caller's key was for; None: all
    models: list[str] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    meta: dict[str, str] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    status: str = VALIDATING
    created_ms: int = _big()
    expires_ms: int = _big()
    in_progress_ms: int | None = _big(null=True)
    finalizing_ms: int | None = _big(null=True)
    completed_ms: int | None = _big(null=True)
    failed_ms: int | None = _big(null=True)
    expired_ms: int | None = _big(null=True)
    cancelling_ms: int | None = _big(null=True)
    cancelled_ms: int | None = _big(null=True)
    ended_ms: int | None = _big(null=True)
    faults: list[dict[str, Any]] = Field(sa_column=Column(JSON, nullable=False))
    faults_count: int = 0
    total: int = 0
    completed: int = 0
    failed: int = 0
    checked: int = 0  # chunks of the file, or of a retry its parent's lines up to this one
    next_line: int = 1  # lines before this one are planned: they are jobs, or were refused
    planned: int = 0
    last_seq: int = 0  # places taken in the order of finishing
    input_tokens: int = _big()
    cached_tokens: int = _big()
    output_tokens: int = _big()
    reasoning_tokens: int = _big()
    cost_nanousd: int = _big()
    unknown_tokens: int = 0  # answers whose tokens nobody knows
    unknown_price: int = 0
    tended_by: str | None = None  # the planner at it, so that not every worker reads every file
    tended_ms: int = _big()


class BatchLine(SQLModel, table=True):
    """One line of a batch; it is a job once it is planned, and has its place once it is over."""

    __tablename__ = "batch_lines"
    __table_args__ = (
        UniqueConstraint("batch_id", "custom_id", name="uq_batch_lines_custom_id"),
        Index(
            "ix_batch_lines_done",
            "batch_id",
            "ok",
            "done_seq",
            sqlite_where=text("done_seq IS NOT NULL"),
            postgresql_where=text("done_seq IS NOT NULL"),
        ),
        # a million rows at a time: kept in the order of their key, without a second copy of it,
        # and without the database looking up the batch of each
        {"sqlite_with_rowid": False},
    )

    batch_id: str = Field(primary_key=True)
    line: int = Field(primary_key=True)
    custom_id: str
    job_id: str | None = None
    done_seq: int | None = None
    ok: bool | None = None
    # of a line that was refused before it was a job
    error_status: int | None = None
    error: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))


class CallerKey(SQLModel, table=True):
    """A caller's key and what it is good for; the key itself is nowhere. Rows are never deleted:
    an API that ever had keys must not become open because none is left."""

    __tablename__ = "caller_keys"
    __table_args__ = (Index("ix_caller_keys_name", "name"),)

    id: str = Field(primary_key=True)
    name: str  # whose it is: the ``caller`` of every other table
    hash: str = Field(unique=True)  # keys.hash_of
    prefix: str  # the beginning of the key, to tell one from another
    scopes: list[str] = Field(sa_column=Column(JSON, nullable=False))
    models: list[str] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    tags: dict[str, str] = Field(sa_column=Column(JSON, nullable=False))
    created_ms: int = _big()
    expires_ms: int | None = _big(null=True)
    revoked_ms: int | None = _big(null=True)
    used_ms: int | None = _big(null=True)  # to the minute


class Webhook(SQLModel, table=True):
    """Where a caller wants to be told of what has ended; its secrets are sealed."""

    __tablename__ = "webhooks"
    __table_args__ = (Index("ix_webhooks_caller", "caller", "id"),)

    id: str = Field(primary_key=True)
    caller: str
    name: str
    url: str
    event_types: list[str] = Field(sa_column=Column(JSON, nullable=False))
    secret: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    secret_hint: str
    old_secret: bytes | None = Field(default=None, sa_column=Column(LargeBinary))
    old_until_ms: int | None = _big(null=True)  # both secrets sign until then
    created_ms: int = _big()
    updated_ms: int = _big()
    disabled_ms: int | None = _big(null=True)
    disabled_why: str | None = None


class Delivery(SQLModel, table=True):
    """One event for one webhook: the outbox, written in the transaction that ended its subject."""

    __tablename__ = "deliveries"
    __table_args__ = (
        Index("ix_deliveries_due", "webhook_id", "state", "next_ms"),
        Index(
            "ix_deliveries_ended",
            "ended_ms",
            sqlite_where=text("ended_ms IS NOT NULL"),
            postgresql_where=text("ended_ms IS NOT NULL"),
        ),
    )

    webhook_id: str = Field(primary_key=True, foreign_key="webhooks.id", ondelete="CASCADE")
    event_id: str = Field(primary_key=True)
    type: str  # job.succeeded, batch.completed, …
    subject: str  # the id of what has ended
    created_ms: int = _big()
    state: str = PENDING
    next_ms: int = _big()  # not before; while it is being sent, when somebody else may
    tries: int = 0  # the fencing token
    status: int | None = None  # of the last try, if there was an answer
    error: str | None = None
    ended_ms: int | None = _big(null=True)


class CustomProvider(SQLModel, table=True):
    """A provider that somebody added; read through `backchannel.custom_providers`, which checks."""

    __tablename__ = "providers"

    id: str = Field(primary_key=True)
    name: str
    type: str
    base_url: str
    default_model: str
    models: list[str] = Field(sa_column=Column(JSON, nullable=False))
    capabilities: dict[str, bool] = Field(sa_column=Column(JSON, nullable=False))
    prices: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    limits: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    needs_key: bool = False
    allow_loopback: bool = False  # it was added on this machine, where loopback means the same
    max_tokens_field: str
    reports_stream_usage: bool = True
    created_ms: int = _big()
    updated_ms: int = _big()


class Secret(SQLModel, table=True):
    """A key, sealed: only a process with the master key can read it."""

    __tablename__ = "secrets"

    name: str = Field(primary_key=True)  # provider:<id>
    sealed: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    version: int = _big()  # of the providers, when it was last set
    created_ms: int = _big()
    updated_ms: int = _big()


class UsedKey(SQLModel, table=True):
    """An Idempotency-Key and what it was used for: see `idempotency`."""

    __tablename__ = "used_keys"

    id: str = Field(primary_key=True)  # made of noun, caller and key: there can be only one
    noun: str
    caller: str
    subject: str  # the id of what was made
    mark: str  # of this making of it
    digest: str  # of what was sent
    created_ms: int = _big()


class Version(SQLModel, table=True):
    """How often something has changed that every process keeps a copy of."""

    __tablename__ = "versions"

    name: str = Field(primary_key=True)  # providers
    version: int = _big()


class Worker(SQLModel, table=True):
    """A worker process and its last heartbeat: how many slots there are, and who is alive."""

    __tablename__ = "workers"

    owner: str = Field(primary_key=True)
    host: str
    pid: int
    slots: int
    in_flight: int = 0
    registry_version: int = Field(  # of the providers it runs with
        default=0, sa_column=Column(BigInteger, nullable=False, server_default="0")
    )
    started_ms: int = _big()
    seen_ms: int = _big(index=True)


# The same tables as Core sees them, for the statements of the hot path.
jobs: Table = Job.__table__  # type: ignore[attr-defined]
requests: Table = JobRequest.__table__  # type: ignore[attr-defined]
results: Table = JobResult.__table__  # type: ignore[attr-defined]
attempts: Table = Attempt.__table__  # type: ignore[attr-defined]
usage: Table = Usage.__table__  # type: ignore[attr-defined]
sessions: Table = ChatSession.__table__  # type: ignore[attr-defined]
turns: Table = Turn.__table__  # type: ignore[attr-defined]
files: Table = File.__table__  # type: ignore[attr-defined]
chunks: Table = FileChunk.__table__  # type: ignore[attr-defined]
batches: Table = Batch.__table__  # type: ignore[attr-defined]
batch_lines: Table = BatchLine.__table__  # type: ignore[attr-defined]
caller_keys: Table = CallerKey.__table__  # type: ignore[attr-defined]
webhooks: Table = Webhook.__table__  # type: ignore[attr-defined]
deliveries: Table = Delivery.__table__  # type: ignore[attr-defined]
providers: Table = CustomProvider.__table__  # type: ignore[attr-defined]
secrets: Table = Secret.__table__  # type: ignore[attr-defined]
used_keys: Table = UsedKey.__table__  # type: ignore[attr-defined]
versions: Table = Version.__table__  # type: ignore[attr-defined]
workers: Table = Worker.__table__  # type: ignore[attr-defined]


def state_is(*states: str, of: FromClause = jobs) -> ColumnElement[bool]:
    """A condition with the states written out: for a parameter no partial index can be prepared."""
    # columns of that text: `literal_execute`, or an IN over values, would write the statement anew
    # at every execution
    written: list[ColumnElement[str]] = [literal_column(f"'{state}'") for state in states]
    return of.c.state.in_(written) if len(written) > 1 else of.c.state == written[0]
