"""One upload: what it shall become, and where it stands while it is live.

The *plan* is kept in the job's cursor, so that whoever finds the upload after a crash knows what
was promised: which blobs it fills, whether it is a part of something, which digest was announced.
The *live* upload exists while a request writes it or while it is being finished.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any

import msgspec

from errors import SluiceError
from jobs.files import now_ms
from jobs.flow import Flow
from jobs.progress import Meter
from storage import Digester, File, Job, Writer

RECEIVING, WAITING, JOINING = "receiving", "waiting", "joining"
CHECKING, PUBLISHING = "checking", "publishing"


class PlannedFile(msgspec.Struct):
    """A file that the upload will publish; ``bytes`` is known once it is whole."""

    id: str
    name: str
    bytes: int = 0


class Plan(msgspec.Struct, omit_defaults=True):
    """What an upload shall become.

    ``by_length``: all bytes there means complete; else the sender says so (``complete``).
    ``partial``: it is only a part, and ``parts`` are the jobs that one is joined from.
    ``expect`` are digests in hex that the whole must have; ``digest`` computes some anyhow.
    ``firm``: the sender frees what it was told is here, so one that loses bytes has failed.
    """

    blobs: list[PlannedFile] = []
    by_length: bool = False
    complete: bool = False
    partial: bool = False
    parts: list[str] = []
    digest: bool = False
    expect: dict[str, str] = {}
    firm: bool = False
    media_type: str | None = None

    def to_json(self) -> Any:
        """As it is kept in the cursor."""
        return msgspec.to_builtins(self)


def plan_of(job: Job) -> Plan:
    """The plan in a job's cursor."""
    return msgspec.convert(job.cursor or {}, Plan)


class Upload:
    """A live upload: the request that writes it, or the task that finishes it.

    ``received`` bytes came off the socket, ``stored`` are written and count, ``durable`` were
    forced to the disk. Bytes whose checksum is still to be seen are written, but do not count.
    """

    def __init__(self, job: Job, hold_s: float) -> None:
        self.job = job
        self.plan = plan_of(job)
        self.flow = Flow(job.want, hold_s, job.limit_bytes_per_s)
        self.meter = Meter("bytes", job.progress)
        self.length = job.transfer.length_bytes if job.transfer is not None else None
        self.writer: Writer | None = None
        self.before = sum(blob.bytes for blob in self.plan.blobs[:-1])  # in the files before
        self.received = self.written = self.stored = self.saved = job.stored_bytes
        self.durable = self.durable_saved = job.durable_bytes
        self.digester: Digester | None = None
        self.check_at = 0  # stored bytes at which the room is looked at again
        self.unchecked = False  # a checksum of what is written now is still to be seen
        self.rate_from = (monotonic(), self.received)  # where the slowest rate is counted from
        self.ending: asyncio.Task[None] | None = None
        self.publishing = False
        self.files: list[File] = []
        self.failure: SluiceError | None = None
        self.released = asyncio.Event()
        self.meter.mark(job.stored_bytes, phase=RECEIVING)

    @property
    def blob(self) -> PlannedFile:
        """The file that is written now."""
        return self.plan.blobs[-1]

    @property
    def processed(self) -> int:
        """Bytes that were hashed; where nothing is hashed, what is stored."""
        if self.digester is None:
            return self.stored
        return min(self.stored, self.before + self.digester.processed)

    def advance(self, stored: int) -> None:
        """``stored`` bytes count now."""
        self.stored = stored
        self.meter.mark(stored)
        if self.digester is not None:
            self.digester.follow(stored - self.before)

    def begin_file(self, blob: PlannedFile) -> None:
        """Another file begins where the last one ended."""
        self.blob.bytes = self.stored - self.before
        self.before = self.stored
        self.plan.blobs.append(blob)
        self.digester = None

    def watch(self, idle_s: float, least_bytes_per_s: int, hold_s: float, stalled_s: float) -> None:
        """Show a sender that sends nothing as stalled; end one that sends too little.

        One that was silent before it was paused never comes to the checkpoint: it ends here, too.
        """
        now = monotonic()
        quiet_s = now - self.flow.moved_at
        if self.flow.want == "pause":
            self.rate_from = (now, self.received)
            self.flow.stalled_at = None
            if quiet_s > hold_s:
                self.flow.end(SluiceError("paused-too-long", retry_after_s=60))
            return
        if quiet_s < 0:  # the limit holds it: it is us who are slow
            self.rate_from = (now, self.received)
            self.flow.stalled_at = None
            return
        since, received = self.rate_from
        slow = False
        if now - since >= idle_s:
            slow = self.received - received < least_bytes_per_s * (now - since)
            self.rate_from = (now, self.received)
        if quiet_s > idle_s or slow:
            self.flow.end(SluiceError("upload-stalled"))
        elif quiet_s < stalled_s:
            self.flow.stalled_at = None
        elif self.flow.stalled_at is None:
            self.flow.stalled_at = now_ms() - int(quiet_s * 1000)
