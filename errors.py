"""The closed catalogue of what can go wrong.

Every error that leaves the service is one row here: a stable code that programs may rely on, an
HTTP status, a title, whether trying again can help, and the next step. Code raises
``SluiceError(code, detail)``; only ``handlers/base.py`` turns it into RFC 9457 problem+json.
``detail`` is for people, names the field or the file, and never a path of this machine.
``python errors.py`` prints docs/errors.md. This module imports nothing of ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Entry(NamedTuple):
    """One row of the catalogue."""

    status: int
    title: str
    retry: bool
    next: str


CATALOGUE: dict[str, Entry] = {
    # The request itself
    "bad-request": Entry(400, "The request is malformed", False, "Correct the request."),
    "invalid-field": Entry(
        400, "A field has a wrong value", False, "Correct the field that is named."
    ),
    "invalid-json": Entry(400, "The body is not the JSON expected", False, "Send a JSON object."),
    "body-too-long": Entry(400, "The body is too long", False, "Send a shorter body."),
    "body-unexpected": Entry(400, "This request takes no body", False, "Send the body by POST."),
    "multipart-invalid": Entry(
        400, "The multipart form is malformed", False, "Send a form as in RFC 7578."
    ),
    "no-file-part": Entry(
        400, "The form has no part named file", False, "Put the file into a field named 'file'."
    ),
    "offset-mismatch": Entry(
        400, "The block does not start where the stored bytes end", True, "Go on from bytes_read."
    ),
    "length-mismatch": Entry(
        400, "The lengths that were told do not agree", False, "Start it again with one length."
    ),
    "name-in-use": Entry(
        400, "A live job of another kind has that name", False, "Choose another name."
    ),
    "unknown-kind": Entry(400, "No such kind of job", False, "GET /v1/kinds lists the kinds."),
    "kind-not-startable": Entry(
        400, "Jobs of this kind are not started here", False, "Use the endpoint of that transfer."
    ),
    "cross-site": Entry(
        403, "Another site may not do this", False, "Send the request from this service's page."
    ),
    "unknown-host": Entry(
        403, "The service does not answer to that host name", False, "Add the name to 'hosts'."
    ),
    "prefetch": Entry(403, "A prefetch starts nothing", False, "Send the request for real."),
    "upload-joined": Entry(
        403, "This upload is made of others", False, "Send the bytes to its parts."
    ),
    "upload-kept": Entry(
        403, "Completed uploads are not deleted here", False, "Delete the file under /v1/files."
    ),
    "not-found": Entry(404, "Nothing is there", False, "Check the address."),
    "job-unknown": Entry(404, "No such job", False, "GET /v1/jobs lists the jobs."),
    "file-unknown": Entry(404, "No such file", False, "GET /v1/files lists the files."),
    "table-unknown": Entry(404, "No such table", False, "GET /v1/tables lists the tables."),
    "upload-unknown": Entry(404, "No such unfinished upload", False, "Start it again."),
    "content-unknown": Entry(
        404, "The job makes no such file", False, "GET the job: it names what it has made."
    ),
    "nothing-uploading": Entry(404, "You are not uploading anything", False, "Nothing to do."),
    "nothing-exporting": Entry(404, "You are not exporting any file", False, "Nothing to do."),
    "method-not-allowed": Entry(405, "The method is not allowed here", False, "See Allow."),
    "upload-stalled": Entry(408, "The sender sent nothing for too long", True, "Go on from there."),
    "upload-gone": Entry(410, "The upload has ended", False, "Start it again."),
    "content-gone": Entry(
        410, "The job has ended without the file", False, "Look at the job's error; retry it."
    ),
    "media-type-wrong": Entry(415, "The body has a wrong type", False, "See the detail."),
    # State
    "upload-terminated": Entry(
        409, "The upload was aborted", False, "Start it again if it was not meant."
    ),
    "export-terminated": Entry(
        409, "The export was terminated", False, "Start it again if it was not meant."
    ),
    "upload-busy": Entry(
        409, "Another request is writing this upload", True, "Wait for it, or ask for the offset."
    ),
    "upload-taken-over": Entry(
        409, "A newer request has taken the upload over", True, "Ask for the offset if you go on."
    ),
    "upload-finishing": Entry(
        409, "All bytes are here; the upload is being checked", True, "Ask again in a moment."
    ),
    "upload-unfinished": Entry(
        409, "The upload is not complete", True, "Send the rest, from the offset on."
    ),
    "upload-complete": Entry(409, "The upload is complete", False, "Nothing is to be sent."),
    "job-finished": Entry(409, "The job has ended", False, "Use retry to run it again."),
    "job-cancelling": Entry(409, "The job is being cancelled", False, "Wait until it has ended."),
    "job-live": Entry(409, "The job has not ended", False, "Cancel it first."),
    "version-mismatch": Entry(
        412, "It has changed since it was read", True, "Read it again, then decide."
    ),
    "tus-version": Entry(
        412, "That version of tus is not spoken here", False, "See Tus-Version for those that are."
    ),
    "too-large": Entry(413, "The file is larger than allowed", False, "Send a smaller file."),
    "range-not-satisfiable": Entry(
        416, "The range lies outside the file", False, "See Content-Range for the size."
    ),
    "quota-exceeded": Entry(
        413, "The owner's quota does not allow it", False, "Delete files, then start again."
    ),
    "checksum-mismatch": Entry(
        460, "The bytes have another checksum than was told", True, "Send them again."
    ),
    "too-many-uploads": Entry(
        429, "Too many uploads are unfinished", True, "Finish or cancel some of them."
    ),
    "busy": Entry(429, "Too many commands at once", True, "Wait for the answers to earlier ones."),
    "key-reused": Entry(
        422, "The key was used for another command", False, "Give each command a key of its own."
    ),
    "key-in-flight": Entry(
        409, "The first command under that key is not done", True, "Ask again in a moment."
    ),
    "queue-full": Entry(429, "Too many jobs are waiting", True, "Try again later."),
    "too-many-sockets": Entry(429, "Too many live channels are open", True, "Close one of them."),
    # The service
    "internal": Entry(500, "Something went wrong here", True, "Report the request_id."),
    "starting": Entry(503, "The service is starting", True, "Try again in a moment."),
    "stopping": Entry(503, "The service is stopping", True, "Try again in a moment."),
    "paused-too-long": Entry(
        503, "The transfer is paused", True, "Resume it, then go on from the stored offset."
    ),
    "not-yet": Entry(
        503, "Those bytes have not come yet", True, "Ask again in a moment, or with follow=1."
    ),
    "storage-missing": Entry(
        503, "The storage is not there", True, "Bring the data folder back, then try again."
    ),
    "storage-failed": Entry(503, "The storage refused the operation", True, "Try again."),
    "disk-full": Entry(507, "The disk is full", True, "Free space, then go on."),
    # How a job can end
    "kind-failed": Entry(500, "The process failed", True, "See the detail, then retry."),
    "crash-loop": Entry(
        500,
        "The server died too often while it ran",
        False,
        "Look at the server's log, then retry.",
    ),
    "timeout": Entry(500, "It ran for longer than it may", False, "Retry with less to do."),
    "stalled": Entry(500, "It showed no sign of life for too long", True, "Retry it."),
    "parent-failed": Entry(
        409,
        "A job that it was to follow has not succeeded",
        False,
        "Retry that job, then this one.",
    ),
    "cursor-incompatible": Entry(
        500, "The saved position is of another version", False, "Retry from the start."
    ),
    "invalid-data": Entry(
        422, "The data can't be read as what it should be", False, "Correct the row that is named."
    ),
    "address-refused": Entry(
        403, "Nothing is fetched from that address", False, "See --fetch-allow for exceptions."
    ),
    "fetch-failed": Entry(
        502, "The other server did not give the file", True, "Try again later; see the detail."
    ),
    "fetch-refused": Entry(
        502, "The other server has no such file for us", False, "Correct the URL; see the detail."
    ),
    "digest-mismatch": Entry(
        409, "The digest is not the expected one", False, "Upload the file again."
    ),
    "client-gone": Entry(400, "The client went away", True, "Send it again."),
    "interrupted": Entry(503, "The server stopped in the middle", True, "Send it again."),
    "expired": Entry(404, "It was not finished in time", False, "Start it again."),
}


class SluiceError(Exception):
    """Refuse with a row of the catalogue.

    ``detail`` says what exactly, for people. ``field`` names the parameter at fault. ``extra``
    goes into the problem as it is (``bytes_read``, ``job``). ``status`` replaces the catalogue's
    status where a dialect prescribes another one.
    """

    def __init__(
        self,
        code: str,
        detail: str = "",
        *,
        field: str | None = None,
        retry_after_s: float | None = None,
        status: int | None = None,
        **extra: Any,
    ) -> None:
        self.entry = CATALOGUE[code]
        self.code = code
        self.detail = detail or self.entry.title + "."
        self.field = field
        self.retry_after_s = retry_after_s
        self.status = status or self.entry.status
        self.extra = extra
        super().__init__(f"{code}: {self.detail}")

    def with_status(self, status: int, **extra: Any) -> SluiceError:
        """The same refusal with another HTTP status, as a dialect prescribes it."""
        return SluiceError(
            self.code,
            self.detail,
            field=self.field,
            retry_after_s=self.retry_after_s,
            status=status,
            **(self.extra | extra),
        )

    def problem(self, request_id: str | None = None) -> dict[str, Any]:
        """The error as an RFC 9457 object."""
        body: dict[str, Any] = {
            "type": f"/errors/{self.code}",
            "title": self.entry.title,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            "message": self.detail,
            "next": self.entry.next,
            "retry": self.entry.retry,
            "retry_after_s": self.retry_after_s,
        }
        if request_id is not None:
            body["request_id"] = request_id
        if self.field is not None:
            body["field"] = self.field
        return body | self.extra


def describe() -> str:
    """The catalogue as a Markdown page."""
    lines = [
        "<!-- made by: python errors.py > docs/errors.md -->",
        "# Errors",
        "",
        "Every error is problem+json (RFC 9457) with a stable `code`; `retry` tells whether the",
        "same request can succeed later.",
        "",
        "| code | status | meaning | retry | next step |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{code}` | {e.status} | {e.title} | {'yes' if e.retry else 'no'} | {e.next} |"
        for code, e in CATALOGUE.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe())
