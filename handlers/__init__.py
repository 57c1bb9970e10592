"""HTTP and WebSocket in, one call of the domain, answer out. Every address is on this page."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tornado.web import RequestHandler

from handlers import (
    asyncapi,
    events,
    files,
    growing,
    jobs,
    live,
    logs,
    metrics,
    page,
    resumable,
    simple,
    status,
    tables,
    tus,
)

STATIC = Path(__file__).parent.parent / "static"
_NAME = r"([A-Za-z0-9._~-]{1,128})"
_ID = r"([A-Za-z0-9-]{1,64})"


class Route(NamedTuple):
    """An address, who answers there, and what each method does."""

    pattern: str
    handler: type[RequestHandler]
    methods: dict[str, str]
    options: dict[str, Any] | None = None


ROUTES: list[Route] = [
    # The simple API
    Route(
        r"/upload/?",
        simple.UploadHandler,
        {
            "GET": "Where to go on with an upload by blocks",
            "POST": "Upload a form, or the next block of a file",
        },
    ),
    Route(
        r"/upload/terminate/?",
        simple.UploadTerminateHandler,
        {"DELETE": "End this caller's running uploads"},
    ),
    Route(
        r"/upload/cancel/?",
        simple.UploadCancelHandler,
        {"POST": "Give an upload by blocks up and remove its bytes"},
    ),
    Route(r"/export/?", simple.ExportHandler, {"POST": "Get a stored file as an attachment"}),
    Route(
        r"/export/terminate/?",
        simple.ExportTerminateHandler,
        {"POST": "End this caller's running exports"},
    ),
    Route(r"/download/?", simple.DownloadHandler, {"GET": "A piece of a stored file as JSON"}),
    Route(
        rf"/{_NAME}/process/?",
        simple.ProcessHandler,
        {"GET": "Start a process, or see the live one", "POST": "The same"},
    ),
    Route(
        rf"/{_NAME}/process/(pause|resume|cancel)/?",
        simple.ProcessCommandHandler,
        {"POST": "Pause, resume or cancel a process"},
    ),
    # tus
    Route(
        r"/tus/?",
        tus.CreationHandler,
        {"OPTIONS": "What of tus is spoken here", "POST": "Create an upload, or join partial ones"},
    ),
    Route(
        rf"/tus/{_ID}",
        tus.UploadHandler,
        {
            "HEAD": "Where to go on",
            "GET": "The bytes of a completed upload, or a range of them",
            "PATCH": "Append bytes",
            "DELETE": "Terminate an upload, or remove its file",
        },
    ),
    # Resumable uploads of the IETF
    Route(
        r"/resumable/?",
        resumable.CreationHandler,
        {
            "OPTIONS": "That uploads can be resumed here, and their limits",
            "POST": "Upload a file, or its beginning",
            "PUT": "The same",
            "PATCH": "The same",
        },
    ),
    Route(
        rf"/resumable/{_ID}",
        resumable.UploadHandler,
        {
            "HEAD": "Where to go on",
            "GET": "The same",
            "PATCH": "Append bytes",
            "DELETE": "Give an upload up, or remove its file",
        },
    ),
    # Jobs
    Route(r"/v1/jobs", jobs.JobsHandler, {"GET": "List jobs", "POST": "Start a process, or many"}),
    Route(  # before the next: these are no ids
        r"/v1/jobs/(pause|resume|cancel|retry|delete)",
        jobs.BulkHandler,
        {"POST": "Pause, resume, cancel, retry or delete many jobs"},
    ),
    Route(
        rf"/v1/jobs/{_ID}",
        jobs.JobHandler,
        {
            "GET": "One job",
            "PATCH": "Rename a job, move it in the queue, limit its transfer",
            "DELETE": "Forget a job that has ended",
        },
    ),
    Route(
        rf"/v1/jobs/{_ID}/(pause|resume|cancel|retry)",
        jobs.CommandHandler,
        {"POST": "Pause, resume, cancel or retry a job"},
    ),
    Route(
        rf"/v1/jobs/{_ID}/content",
        growing.JobContentHandler,
        {
            "GET": "The bytes that a job makes, also while they come",
            "HEAD": "Their headers",
        },
    ),
    Route(rf"/v1/jobs/{_ID}/events", jobs.EventsHandler, {"GET": "The history of a job"}),
    Route(
        rf"/v1/jobs/{_ID}/log",
        logs.LogHandler,
        {"GET": "What a job says, also as it says it"},
    ),
    Route(r"/v1/kinds", jobs.KindsHandler, {"GET": "What can be started"}),
    # Files
    Route(r"/v1/files", files.FilesHandler, {"GET": "List stored files"}),
    Route(
        rf"/v1/files/{_ID}",
        files.FileHandler,
        {"GET": "What is known of a file", "DELETE": "Remove a file"},
    ),
    Route(  # before the next: a file may be named "content"
        r"/v1/files/by-name/([^/]+)",
        files.NewestHandler,
        {"GET": "Where the newest version of a name is", "HEAD": "The same"},
    ),
    Route(
        rf"/v1/files/{_ID}/content",
        files.ContentHandler,
        {"GET": "The bytes of a file, or ranges of them", "HEAD": "Their headers"},
    ),
    Route(rf"/v1/files/{_ID}/sample", files.SampleHandler, {"GET": "The first rows of a file"}),
    # Tables
    Route(r"/v1/tables", tables.TablesHandler, {"GET": "List tables"}),
    Route(r"/v1/tables/([^/]+)", tables.TableHandler, {"GET": "What a table has"}),
    Route(r"/v1/tables/([^/]+)/rows", tables.RowsHandler, {"GET": "Rows of a table"}),
    # The channel and the service itself
    Route(r"/v1/ws", live.LiveHandler, {"GET": "The live channel (WebSocket)"}),
    Route(
        r"/v1/events",
        events.EventsHandler,
        {"GET": "The live channel as server-sent events, or by long-poll"},
    ),
    Route(r"/asyncapi.json", asyncapi.AsyncApiHandler, {"GET": "The live channel as AsyncAPI"}),
    Route(r"/v1/status", status.StatusHandler, {"GET": "The numbers of now"}),
    Route(r"/metrics", metrics.MetricsHandler, {"GET": "The numbers of now, for Prometheus"}),
    Route(r"/healthz", status.HealthHandler, {"GET": "The loop lives"}),
    Route(r"/readyz", status.ReadyHandler, {"GET": "Recovery is done"}),
    Route(r"/errors/([a-z-]{1,64})", status.ErrorPageHandler, {"GET": "What an error means"}),
    # The dashboard
    Route(
        r"/static/(.*)", page.PageHandler, {"GET": "Files of the dashboard"}, {"path": str(STATIC)}
    ),
    Route(
        r"/()",
        page.PageHandler,
        {"GET": "The dashboard"},
        {"path": str(STATIC), "default_filename": "index.html"},
    ),
]
