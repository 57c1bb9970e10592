"""One download at full speed, against nginx sending the same bytes by sendfile.

Claims: ``GET /v1/files/{id}/content`` reaches at least 0.95 x nginx's throughput, at no more than
1.5 x its CPU. The file is in memory for both. curl reads it and tells the time.
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
    at_most,
    compare,
    curl,
    file_of_both,
    main,
    place,
)


def measure() -> Report:
    """Compare both, with the very same file."""
    with place() as folder, Sluice(folder) as ours, Nginx(folder) as nginx:
        file = file_of_both(folder, ours, nginx)
        figures = compare(
            [
                Way("nginx sendfile", nginx.pid, lambda: curl(f"{nginx.url}/big")),
                Way("Sluice", ours.pid, lambda: curl(f"{ours.url}/v1/files/{file}/content")),
            ],
            SIZE,
        )
    return Report(
        "Download",
        HEAD,
        [each.row for each in figures],
        [
            at_least("Sluice : nginx", figures[1].ratio, 0.95),
            at_most(
                "CPU, Sluice : nginx", figures[1].cpu_s_per_gib / figures[0].cpu_s_per_gib, 1.5
            ),
        ],
    )


if __name__ == "__main__":
    sys.exit(main(measure))
