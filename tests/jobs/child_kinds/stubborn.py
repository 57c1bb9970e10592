"""Reaches no checkpoint, ignores TERM, and so does what it starts."""

from __future__ import annotations

import signal
import subprocess

import msgspec

from jobs.kinds import Context

KIND = "stubborn"
TITLE = "Never looks up"
RUNNER = "child"


class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Nothing."""


async def run(ctx: Context, params: Params) -> None:
    """Compute for ever."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    while True:
        pass
