"""Health, readiness, the numbers of now, and the catalogue of errors."""

from __future__ import annotations

from errors import CATALOGUE, SluiceError
from handlers.base import BaseHandler

_SLOW_KINDS = 10  # that status names


class HealthHandler(BaseHandler):
    """Whether the loop lives."""

    OPEN = True

    async def get(self) -> None:
        """200 as soon as requests are served."""
        self.reply({"status": "ok"})


class ReadyHandler(BaseHandler):
    """Whether work is taken."""

    OPEN = True

    async def get(self) -> None:
        """200 once recovery is done, 503 before and while stopping."""
        life = self.services.life
        if life.stopping or not life.ready:
            raise SluiceError("stopping" if life.stopping else "starting", retry_after_s=1)
        self.reply({"status": "ready"})


class StatusHandler(BaseHandler):
    """The numbers of now."""

    async def get(self) -> None:
        """What moves, what waits, what is free, and which kinds have held the loop."""
        services = self.services
        slow = services.manager.measures.slow_steps.items()
        worst = sorted(slow, key=lambda found: found[1].worst_s, reverse=True)[:_SLOW_KINDS]
        row = await services.now.row(services, self.caller.owner)
        row["slow_steps"] = [
            {"kind": kind, "n": steps.n, "worst_ms": round(steps.worst_s * 1e3, 1)}
            for kind, steps in worst
        ]
        self.set_header("Cache-Control", "no-store")
        self.reply(row)


class ErrorPageHandler(BaseHandler):
    """What an error's ``type`` points to."""

    async def get(self, code: str) -> None:
        """The row of the catalogue."""
        entry = CATALOGUE.get(code)
        if entry is None:
            raise SluiceError("not-found", "No error has that code.")
        self.reply({"code": code, **entry._asdict()})
