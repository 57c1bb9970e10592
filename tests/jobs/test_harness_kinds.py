"""Every kind that comes with the service, disturbed at every point (or at some of them)."""

from __future__ import annotations

import gzip
import json
import random
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import zstandard

from jobs.harness import check
from jobs.kinds import Registry
from tests.harness import FULL, Server


@cache
def table(rows: int = 1500) -> bytes:
    """A CSV with numbers, texts and dates."""
    rng = random.Random(rows)
    lines = [
        f'{n},"name {rng.random()}, {"x" * rng.randrange(40)}",2030-01-{n % 28 + 1:02}'
        for n in range(rows)
    ]
    return "\n".join(["n,name,at", *lines, ""]).encode()


@cache
def records(rows: int = 1500) -> bytes:
    """The same sort of rows as JSON lines."""
    rng = random.Random(rows)
    items = ({"n": n, "text": "y" * rng.randrange(60), "more": {"a": n}} for n in range(rows))
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


@cache
def noise(size_bytes: int) -> bytes:
    """Bytes that can't be compressed."""
    return random.Random(size_bytes).randbytes(size_bytes)


def frames(data: bytes, count: int) -> bytes:
    """The same text so many times, each as a frame of Zstandard."""
    return zstandard.compress(data) * count


class Case(NamedTuple):
    """A run of a kind whose points are tried."""

    kind: str
    params: dict[str, Any]
    files: dict[str, bytes]
    least: int = 10  # checkpoints, so that there is something to try
    ignore: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


PROGRAMS = """
[sort]
argv = ["sort", "-r"]
stdin = "file"
stdout = "{file.name}.sorted"
params.file = {type = "file"}

[sha256sum]
argv = ["sha256sum"]
stdin = "file"
params.file = {type = "file"}
"""


def cases() -> dict[str, Case]:
    """At least one run of each kind."""
    csv, jsonl, big = {"a.csv": table()}, {"b.jsonl": records()}, {"big.bin": noise(2 << 20)}
    text, both = {"a.csv": table(30_000)}, {"a.csv": table(), "b.jsonl": records()}
    packed = {"a.csv.gz": gzip.compress(table(30_000))}
    wrong = {"a.csv": table(12_000).replace(b"\n77", b"\nx77")}
    typed = {"source": "a.csv", "types": {"n": "integer"}}
    used = ("cpu_s", "peak_bytes")  # of a program; chance
    return {
        "count": Case("count", {"steps": 12, "delay_s": 0.001, "undo_steps": 6}, {}),
        "checksum": Case("checksum", {"file": "big.bin", "algorithms": ["sha256", "crc32"]}, big),
        "archive": Case("archive", {"files": ["big.bin", "a.csv"]}, big | csv),
        "export-csv": Case("export", {"source": "a.csv", "where": "n >= 100"}, csv),
        "export-gz": Case("export", {"source": "b.jsonl", "format": "csv.gz"}, jsonl),
        "export-two": Case("export", {"source": ["b.jsonl", "a.csv"], "format": "jsonl"}, both),
        "export-parquet": Case("export", {"source": "a.csv", "format": "parquet"}, csv, 1),
        "compress-gzip": Case("compress", {"file": "a.csv", "level": 1}, {"a.csv": table(12_000)}),
        "compress-zstd": Case("compress", {"file": "big.bin", "format": "zstd"}, big),
        "decompress-gzip": Case("decompress", {"file": "a.csv.gz"}, packed),
        "decompress-zstd": Case(
            "decompress", {"file": "big.zst"}, {"big.zst": frames(noise(400_000), 4)}
        ),
        "scrub": Case("scrub", {}, big | csv),
        "scrub-digests": Case("scrub", {}, big | csv, options=("--digest", "always")),
        "csv-validate": Case("csv.validate", typed, wrong),
        "csv-import": Case("csv.import", {"source": "a.csv"}, {"a.csv": table(12_000)}),
        "csv-import-skip": Case("csv.import", typed | {"on_error": "skip"}, wrong),
        "exec-sort": Case("exec.sort", {"file": "a.csv"}, text, 1, used, PROGRAMS_HERE),
        "exec-sha256sum": Case("exec.sha256sum", {"file": "big.bin"}, big, 1, used, PROGRAMS_HERE),
    }


PROGRAMS_HERE = ("--programs", "{programs}")
CASES = cases()


def one_of_each() -> list[str]:
    """The first case of each kind."""
    return list({case.kind: name for name, case in reversed(CASES.items())}.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES if FULL else one_of_each())
def test_our_kinds_go_on_wherever_they_are_disturbed(name: str, tmp_path: Path) -> None:
    """Paused or killed at any point a kind ends as undisturbed; cancelled it leaves nothing."""
    case = CASES[name]
    (tmp_path / "programs.toml").write_text(PROGRAMS)
    report = check(
        case.kind,
        case.params,
        case.files,
        sample=0 if FULL else 1,
        modes=("warm", "cold", "kill", "cancel", "child") if FULL else ("cold", "kill", "cancel"),
        ignore=case.ignore,
        options=[text.format(programs=tmp_path / "programs.toml") for text in case.options],
    )
    assert report.points["checkpoint"] >= case.least
    assert report.missed == 0 or "wait" in report.points  # how many waits there are is chance


@pytest.mark.slow
def test_a_fetch_goes_on_wherever_it_is_disturbed(server: Server) -> None:
    """A file that is fetched is whole, and a cancelled fetch leaves nothing."""
    data = noise(3 << 20)
    file = server.post("/upload?file_name=big.bin&is_complete=true", data).json
    report = check(
        "fetch",
        {"url": f"{server.url}/v1/files/{file['id']}/content", "name": "copy.bin"},
        sample=0 if FULL else 2,
        options=["--fetch-allow", "127.0.0.1"],
        ignore=["seconds"],
    )
    assert report.points["checkpoint"] >= 5


def test_each_kind_is_tried() -> None:
    """None of the kinds that come with the service is forgotten here."""
    tried = {case.kind for case in CASES.values()} | {"fetch"}
    assert set(Registry.load().names()) <= tried
