"""One upload at full speed, against nginx taking the same file by PUT (ngx_http_dav).

Claims: a raw body reaches at least 1.0 x nginx's throughput, a form at least 0.8 x (it has to be
searched for its boundary). All store on the same file system and publish by a rename; ours also
keeps a job with progress. curl sends the same file to each and tells the time. nginx is the peer as
it comes; with a buffer as big as ours (``client_body_buffer_size 1m``) it stands beside it.
"""

from __future__ import annotations

import sys

from benchmarks.common import (
    HEAD,
    SIZE,
    Nginx,
    Report,
    Sluice,
    Way,
    at_least,
    compare,
    curl,
    main,
    place,
    source_file,
)


def measure() -> Report:
    """Compare the three ways."""
    with (
        place() as folder,
        Sluice(folder) as ours,
        Nginx(folder) as nginx,
        Nginx(folder, "tuned", "1m") as tuned,
    ):
        source = str(source_file(folder / "source", SIZE))
        raw = f"{ours.url}/upload?file_name=raw&file_size={SIZE}"
        figures = compare(
            [
                Way(
                    "nginx PUT",
                    nginx.pid,
                    lambda: curl("-T", source, f"{nginx.url}/target"),
                    (nginx.files / "target").unlink,
                ),
                Way(
                    "nginx PUT, buffer of 1 MiB",
                    tuned.pid,
                    lambda: curl("-T", source, f"{tuned.url}/target"),
                    (tuned.files / "target").unlink,
                ),
                Way(
                    "Sluice, raw body",
                    ours.pid,
                    lambda: curl("-T", source, raw, "-X", "POST"),
                    ours.remove_newest_file,
                ),
                Way(
                    "Sluice, form",
                    ours.pid,
                    lambda: curl("-F", f"file=@{source}", f"{ours.url}/upload"),
                    ours.remove_newest_file,
                ),
            ],
            SIZE,
        )
    *_, raw_body, form = figures
    return Report(
        "Upload",
        HEAD,
        [each.row for each in figures],
        [
            at_least("raw body : nginx", raw_body.ratio, 1.0),
            at_least("form : nginx", form.ratio, 0.8),
        ],
    )


if __name__ == "__main__":
    sys.exit(main(measure))
