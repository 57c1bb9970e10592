"""Sluice: uploads, downloads and long processes that can be paused, resumed and cancelled.

The entry: reads the configuration, puts the parts together, listens, and stops with grace. Nothing
else reads the configuration or opens a backend; all other modules get plain values.

    python server.py --port 8888 --data ./data
    python server.py add FILE...
    python server.py check KIND [PARAMS-JSON] [FILE...]

One process, one thread, one loop.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import http.client
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit

import msgspec
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application

from config import Config, ConfigError, load
from errors import SluiceError
from handlers import ROUTES, STATIC
from handlers.auth import Cors, Hosts, Proxies
from handlers.base import Door, Life, NotFoundHandler, Services, Settings
from handlers.feed import Feeds
from handlers.live import MESSAGE_BYTES
from handlers.now import Now
from handlers.page import warm
from jobs.add import add
from jobs.children import Children
from jobs.commands import Commands
from jobs.downloads import Downloads
from jobs.events import Hub
from jobs.files import Files
from jobs.growing import Growing
from jobs.harness import Misused, examine, parse
from jobs.kinds import Registry
from jobs.kinds._exec import load as load_programs
from jobs.manager import Limits, Manager
from jobs.resolve import Resolver
from jobs.runners import Runners
from jobs.trial import Ground
from jobs.uploads import Limits as UploadLimits
from jobs.uploads import Uploads
from storage import Blobs, State, open_blobs, open_state

log = logging.getLogger("sluice")

_HOUSEKEEPING_S = 60.0
_CLOSING_S = 3.0  # of the grace at a stop, kept for what follows the checkpoints
_OWNER = "local"
_COLLECT = (5000, 5, 10)  # new objects before the youngest are looked at, and so on


class CannotStart(Exception):
    """Said in one line to the person who starts the service."""


@dataclass
class Parts:
    """The service, put together."""

    state: State
    blobs: Blobs
    services: Services


def lock_folder(folder: Path) -> IO[str]:
    """Own the data folder as long as the returned file is open. Raises CannotStart."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a+", encoding="utf-8")  # noqa: SIM115 - held until the end
    except OSError as error:
        raise CannotStart(f"the data folder {folder} can't be used: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise CannotStart(f"the data folder {folder} is in use by {owner}") from None
    return file


def note_owner(lock: IO[str], url: str) -> None:
    """Leave word of who owns the folder."""
    lock.seek(0)
    lock.truncate()
    lock.write(f"process {os.getpid()} at {url}\n")
    lock.flush()


@asynccontextmanager
async def assembled(config: Config, kinds: Registry | None = None) -> AsyncIterator[Parts]:
    """The parts of the service, opened; closed at the end. ``kinds`` instead of all there are."""
    folder = config.data.resolve()
    blobs = open_blobs(f"file://{folder}", config.durability)
    await blobs.open()
    state = open_state(f"sqlite://{folder / 'state.db'}", config.durability, config.keep_events)
    boot = await state.open()
    manager = Manager(
        state,
        _kinds(config) if kinds is None else kinds,
        boot,
        Limits(
            slots=config.slots,
            warn_s=config.warn_s,
            grace_s=config.grace_s,
            max_queued=config.max_queued,
            owner_queued=config.owner_queued,
            owner_slots=config.owner_slots,
            kind_limits=config.kind_limits,
            run_timeouts_s=config.run_timeouts_s,
            stall_timeouts_s=config.stall_timeouts_s,
            keep_jobs_s=config.keep_jobs_s,
        ),
    )
    files = Files(state, blobs)
    children = Children(folder)
    Runners(
        manager,
        state,
        blobs,
        files,
        warm_s=config.warm_s,
        children=children,
        child_grace_s=config.child_grace_s,
        max_stopped=config.max_stopped,
        resolver=Resolver(children, config.fetch_allow),
    )
    uploads = Uploads(
        manager,
        state,
        blobs,
        UploadLimits(
            max_bytes=config.max_upload_bytes,
            expires_s=config.upload_expires_s,
            hold_s=config.pause_hold_s,
            idle_s=config.body_idle_s,
            durability=config.durability,
            quota_bytes=config.quota_bytes,
            max_uploads=config.max_uploads,
            min_bytes_per_s=config.body_min_bytes_per_s,
            digest=config.digest,
        ),
    )
    hub = Hub(state, boot)
    services = Services(
        manager=manager,
        children=children,
        uploads=uploads,
        downloads=Downloads(manager, state, hold_s=config.pause_hold_s),
        growing=Growing(manager, blobs),
        files=files,
        hub=hub,
        feeds=Feeds(hub, manager),
        commands=Commands(manager),
        now=Now(),
        hosts=Hosts(config.address, config.hosts),
        cors=Cors(config.cors_origins),
        proxies=Proxies(config.trusted_proxies),
        life=Life(),
        settings=Settings(
            max_json_bytes=config.max_json_bytes,
            chunk_bytes=config.chunk_bytes,
            write_idle_s=config.write_idle_s,
            terminate_recent_s=config.terminate_recent_s,
            default_kind=config.default_kind,
            default_params=dict(config.default_params),
            max_sockets=config.max_sockets,
            slots=config.slots,
            body_idle_s=config.body_idle_s,
            delete_completed=config.delete_completed,
            informational=config.informational == "on",
        ),
    )
    try:
        await children.open()
        yield Parts(state, blobs, services)
    finally:
        await children.close()
        await blobs.close()
        await state.close()


def _kinds(config: Config) -> Registry:
    """All kinds that the configuration names."""
    programs = load_programs(config.programs) if config.programs is not None else ([], [])
    return Registry.load(config.kinds, programs)


def make_app(services: Services) -> Application:
    """The addresses of the service over its domain."""
    return Door(
        [(route.pattern, route.handler, route.options or {}) for route in ROUTES],
        services,
        default_handler_class=NotFoundHandler,
        websocket_max_message_size=MESSAGE_BYTES,
        log_function=_log_request,
    )


def _log_request(handler: Any) -> None:
    request = handler.request
    log.debug(
        "%s %s %d %.1f ms",
        request.method,
        request.path,
        handler.get_status(),
        request.request_time() * 1e3,
    )


async def recover(parts: Parts) -> None:
    """Put right what an earlier run left, then take work."""
    keep = await parts.services.manager.recover()
    swept = await parts.blobs.sweep(set(keep))
    if swept:
        log.info("%d unfinished files without a job were removed", swept)
    parts.services.manager.open()
    parts.services.life.ready = True


async def housekeep(services: Services) -> None:
    """Remove what has expired, once a minute."""
    while True:
        await asyncio.sleep(_HOUSEKEEPING_S)
        try:
            await services.files.expire()
            await services.uploads.expire()
        except SluiceError as error:
            log.warning("housekeeping: %s", error)


async def serve(config: Config, lock: IO[str]) -> None:
    """Run the service until a signal stops it."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)  # recovery puts right what this leaves
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        sockets = bind_sockets(config.port, config.address)
    except OSError as error:
        raise CannotStart(
            f"port {config.port} of {config.address} can't be used: {error.strerror}"
        ) from error
    async with assembled(config) as parts:
        services = parts.services
        warm(STATIC)
        server = HTTPServer(make_app(services), idle_connection_timeout=120)
        server.add_sockets(sockets)
        host = f"[{config.address}]" if ":" in config.address else config.address
        url = f"http://{host}:{sockets[0].getsockname()[1]}/"
        note_owner(lock, url)
        print(f"Sluice is at {url} (data in {config.data})", flush=True)
        background = [
            asyncio.create_task(work)
            for work in (
                services.hub.run(),
                services.now.run(services),
                services.feeds.run(partial(services.now.row, services)),
                housekeep(services),
            )
        ]
        for task in background:
            task.add_done_callback(partial(_notice, stop))
        await recover(parts)
        await stop.wait()
        log.info("stopping")
        services.life.stopping = True
        services.feeds.bye()
        await services.manager.close(max(0.1, config.stop_grace_s - _CLOSING_S))
        server.stop()
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await asyncio.sleep(0.3)  # answers and goodbyes on their way
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await server.close_all_connections()
    # A process that swallows its cancellation must not keep the service from ending.
    loop.call_later(1.0, os._exit, 0)


def _notice(stop: asyncio.Event, task: asyncio.Task[None]) -> None:
    """A service without one of its parts would look healthy, and lie: end it."""
    if not task.cancelled():
        log.critical("a part of the service has ended", exc_info=task.exception())
        stop.set()


async def add_here(config: Config, paths: Sequence[Path]) -> None:
    """Store local files while no server runs."""
    async with assembled(config) as parts:
        await recover(parts)
        try:
            for path in paths:
                file = await add(parts.services.uploads, path, _OWNER)
                print(f"{file.id}  {file.name} (version {file.version}, {file.bytes} bytes)")
        finally:
            await parts.services.manager.close(1.0)


def add_by(url: str, paths: Sequence[Path]) -> None:
    """Store local files through the server that owns the folder."""
    at = urlsplit(url)
    for path in paths:
        size = path.stat().st_size
        target = f"/upload?file_name={quote(path.name, safe='')}&file_size={size}"
        connection = http.client.HTTPConnection(at.hostname or "", at.port or 80, timeout=600)
        with path.open("rb") as file:
            headers = {"Content-Length": str(size), "X-Client-Id": f"add-{os.getpid()}"}
            connection.request("POST", target, file, headers)
            answer = json.loads(connection.getresponse().read())
        if "id" not in answer:
            raise CannotStart(f"{path.name}: {answer.get('message', 'the server refused it')}")
        print(f"{answer['id']}  {path.name} ({size} bytes)")


def run_add(config: Config, names: Sequence[str]) -> None:
    """``server.py add FILE...``, with or without a running server."""
    paths = [Path(name) for name in names]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise CannotStart(f"no such file: {', '.join(missing)}" if missing else "add what?")
    try:
        lock = lock_folder(config.data)
    except CannotStart as error:
        _, _, url = str(error).rpartition(" at ")
        if not url.startswith("http"):
            raise
        add_by(url, paths)
        return
    with lock:
        asyncio.run(add_here(config, paths))


@asynccontextmanager
async def trial_ground(
    config: Config, folder: Path, kinds: Registry, warm_s: float
) -> AsyncIterator[Ground]:
    """The service on a folder of a trial (see jobs.trial)."""
    here = replace(config, data=folder, warm_s=warm_s, durability="never")
    async with assembled(here, kinds) as parts:
        await recover(parts)
        services = parts.services
        try:
            yield Ground(services.manager, services.uploads, services.files)
        finally:
            await services.manager.close(_CLOSING_S)


def run_check(config: Config, words: Sequence[str]) -> int:
    """``server.py check KIND``: try a kind; 1 if a disturbance changes what comes of it."""
    ask = parse(words)

    def load_kinds(paths: Sequence[Path]) -> Registry:
        return _kinds(replace(config, kinds=(*config.kinds, *paths)))

    try:
        report = examine(ask, partial(trial_ground, config), load_kinds)
    except KeyboardInterrupt:
        return 130
    print(msgspec.json.encode(report).decode() if ask.json else report.text())
    return 0 if report.ok else 1


def collect_rarely() -> None:
    """Let the collector of cycles look less often, and never at what is there for good.

    A job is many small objects that all go when it ends, by their counts; to look at them again and
    again meanwhile took a tenth of its time.
    """
    gc.freeze()
    gc.set_threshold(*_COLLECT)


def set_up(config: Config) -> None:
    """Process-wide things: log, file descriptors, memory."""
    collect_rarely()
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def split(argv: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """The options, the command if there is one, and what follows it."""
    for at, word in enumerate(argv):
        if word in ("add", "check"):
            return list(argv[:at]), word, list(argv[at + 1 :])
    return list(argv), "", []


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    if sys.platform != "linux" or sys.version_info < (3, 11):
        print("sluice: needs Linux and Python 3.11 or newer", file=sys.stderr)
        return 1
    try:
        options, command, words = split(sys.argv[1:] if argv is None else argv)
        config = load(options, os.environ)
        set_up(config)
        if command == "add":
            run_add(config, words)
            return 0
        if command == "check":
            return run_check(config, words)
        with lock_folder(config.data) as lock:
            asyncio.run(serve(config, lock))
        return 0
    except (ConfigError, Misused) as error:
        print(f"sluice: {error}", file=sys.stderr)
        return 2
    except (CannotStart, SluiceError) as error:
        detail = error.detail if isinstance(error, SluiceError) else str(error)
        print(f"sluice: {detail}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
