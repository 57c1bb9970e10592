"""Tables over HTTP: list, columns, rows with filters page by page, the database itself."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.handlers.clients import Caller
from tests.harness import FULL, Server

ROWS = 3000
HEADER = ["n", "name", "price", "open", "day"]


def csv_of(rows: int) -> bytes:
    """A file that becomes a table of all sorts of columns."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(HEADER)
    for n in range(rows):
        name = ["Ann", "Bob", 'O\'Neil, "Jo"', ""][n % 4]
        writer.writerow([n, name, n / 4, "true" if n % 3 else "false", f"2026-01-{n % 28 + 1:02d}"])
    return text.getvalue().encode()


def as_json(n: int) -> dict[str, Any]:
    """The row of that number, from 0."""
    name = ["Ann", "Bob", 'O\'Neil, "Jo"', None][n % 4]
    values = [n, name, n / 4, bool(n % 3), f"2026-01-{n % 28 + 1:02d}"]
    return dict(zip(HEADER, values, strict=True))


def imported(site: Server, name: str, data: bytes, **params: Any) -> str:
    """Import a file as a table; its id."""
    Caller(site, "tables").store(f"{name}.csv", data)
    body = {"kind": "csv.import", "params": {"source": f"{name}.csv", "table": name} | params}
    job = site.post("/v1/jobs", body).json
    ended = site.wait_for(job["id"], "succeeded", "failed", within_s=60)
    assert ended["state"] == "succeeded", ended["error"]
    return str(ended["result"]["file"])


@pytest.fixture(scope="module")
def table(site: Server) -> str:
    """The id of a table of 3,000 rows, named orders."""
    return imported(site, "orders", csv_of(ROWS))


def pages(site: Server, path: str) -> Iterator[dict[str, Any]]:
    """All pages from an address on."""
    after = ""
    while True:
        page = site.get(f"{path}{after}").json
        yield page
        if page["next"] is None:
            return
        after = f"&after={page['next']}"


def refused(site: Server, path: str, status: int, code: str, field: str | None = None) -> str:
    """The detail of a refusal."""
    answer = site.get(path)
    assert (answer.status, answer.json["code"]) == (status, code), answer.json
    assert answer.json.get("field") == field
    return str(answer.json["detail"])


def test_a_table_is_described(site: Server, table: str) -> None:
    """By name or by id: a file with columns, types and a number of rows."""
    row = site.get("/v1/tables/orders").json
    assert row == site.get(f"/v1/tables/{table}").json
    assert (row["id"], row["rows"], row["media_type"]) == (
        *(table, ROWS, "application/vnd.sqlite3"),
    )
    types = ["integer", "text", "real", "boolean", "date"]
    assert row["columns"] == [
        {"name": name, "type": type} for name, type in zip(HEADER, types, strict=True)
    ]
    assert row["about"] == {"source": "orders.csv", "delimiter": ",", "null": [""]}
    assert site.get(f"/v1/files/{table}").json.items() <= row.items()


def test_the_newest_versions_are_listed(site: Server) -> None:
    """Each table once, newest first, page by page; other files are none."""
    ids = {}
    for n in range(3):
        imported(site, f"listed {n}", b"a\n1\n")
        ids[f"listed {n}"] = imported(site, f"listed {n}", b"a\n1\n2\n")
    found = [row for page in pages(site, "/v1/tables?limit=2") for row in page["items"]]
    mine = [row for row in found if row["name"] in ids]
    assert [row["name"] for row in mine] == [f"listed {n}" for n in (2, 1, 0)]
    assert {row["name"]: row["id"] for row in mine} == ids
    assert all((row["version"], row["rows"]) == (2, 2) for row in mine)
    assert not [row for row in found if row["name"].endswith(".csv")]


def test_all_rows_page_by_page(site: Server, table: str) -> None:
    """In their order, without a gap; the next page keeps to the version of the first."""
    found = [
        row for page in pages(site, "/v1/tables/orders/rows?limit=499") for row in page["items"]
    ]
    assert found == [as_json(n) for n in range(ROWS)]
    first = site.get("/v1/tables/orders/rows?limit=1")
    assert first.json["table"] == table
    assert first.headers["Link"] == f'</v1/tables/{table}/rows?limit=1&after=1>; rel="next"'


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ("n = 7", lambda row: row["n"] == 7),
        ("n >= 2990 and n != 2995.0", lambda row: row["n"] >= 2990 and row["n"] != 2995),
        ("price between 10 and 10.5", lambda row: 10 <= row["price"] <= 10.5),
        ("name is null and n < 50", lambda row: row["name"] is None and row["n"] < 50),
        ("name = 'O''Neil, \"Jo\"' and n < 50", lambda row: row["n"] % 4 == 2 and row["n"] < 50),
        ("name like 'B%' and n < 50", lambda row: row["name"] == "Bob" and row["n"] < 50),
        ("open = false and n < 50", lambda row: not row["open"] and row["n"] < 50),
        ("day in ('2026-01-28') and n < 99", lambda row: row["n"] % 28 == 27 and row["n"] < 99),
        ("n like '99_'", lambda row: 990 <= row["n"] <= 999),
        ("not (n < 2999)", lambda row: row["n"] == 2999),
        ("n = 'x'", lambda row: False),
    ],
)
def test_rows_that_pass_a_filter(site: Server, table: str, where: str, wanted: Any) -> None:
    """The language of exports, on typed columns."""
    path = f"/v1/tables/{table}/rows?where={quote(where)}&limit=7"
    found = [row for page in pages(site, path) for row in page["items"]]
    assert found == [row for row in map(as_json, range(ROWS)) if wanted(row)]


def test_chosen_columns(site: Server, table: str) -> None:
    """In the order wanted, also where others are tested."""
    path = f"/v1/tables/{table}/rows?columns=day,n&where={quote('price = 1')}"
    assert site.get(path).json["items"] == [{"day": "2026-01-05", "n": 4}]
    again = site.get(f"/v1/tables/{table}/rows?columns=day&columns=n&limit=1").json["items"]
    assert list(again[0]) == ["day", "n"]


def test_rows_as_csv_and_as_lines(site: Server, table: str) -> None:
    """What Accept asks for; the next page is in Link."""
    path = f"/v1/tables/{table}/rows?limit=3"
    got = site.get(path, Accept="text/csv")
    assert got.headers["Content-Type"].startswith("text/csv")
    assert list(csv.reader(io.StringIO(got.body.decode(), newline=""))) == [
        HEADER,
        ["0", "Ann", "0.0", "false", "2026-01-01"],
        ["1", "Bob", "0.25", "true", "2026-01-02"],
        ["2", 'O\'Neil, "Jo"', "0.5", "true", "2026-01-03"],
    ]
    lines = site.get(path, Accept="application/x-ndjson")
    assert [json.loads(line) for line in lines.body.splitlines()] == [as_json(n) for n in range(3)]
    for answer in (got, lines):
        assert answer.headers["Link"] == f'<{path}&after=3>; rel="next"'
        assert answer.headers["Vary"] == "Accept"


def test_what_is_refused(site: Server, table: str) -> None:
    """Unknown tables, columns and filters are named."""
    Caller(site, "tables").store("plain.txt", b"abc")
    for path in ("/v1/tables/unknown", "/v1/tables/unknown/rows", "/v1/tables/plain.txt"):
        refused(site, path, 404, "table-unknown")
    rows = f"/v1/tables/{table}/rows"
    assert "'x'" in refused(site, f"{rows}?columns=n,x", 400, "invalid-field", "columns")
    assert "'x'" in refused(site, f"{rows}?where={quote('x = 1')}", 400, "invalid-field", "where")
    refused(site, f"{rows}?where={quote('n = ')}", 400, "invalid-field", "where")
    refused(site, f"{rows}?limit=501", 400, "invalid-field", "limit")
    refused(site, f"{rows}?order=n", 400, "invalid-field", "order")


def test_a_filter_is_never_sql(site: Server) -> None:
    """Names and values that look like SQL find the columns and cells that they name."""
    odd = 'x" FROM meta; --'
    head = io.StringIO(newline="")
    csv.writer(head).writerow([odd, "rowid"])
    table = imported(site, "odd", head.getvalue().encode() + b"1 OR 1=1,7\n2,8\n")
    quoted = '"' + odd.replace('"', '""') + '"'
    where = quote(f"{quoted} = '1 OR 1=1'")
    path = f"/v1/tables/{table}/rows?where={where}"
    assert site.get(path).json["items"] == [{odd: "1 OR 1=1", "rowid": 7}]
    assert site.get(f"/v1/tables/{table}/rows?columns={quote(odd)}").json["items"] == [
        *({odd: "1 OR 1=1"}, {odd: "2"}),
    ]


def test_the_file_is_a_database(site: Server, table: str, tmp_path: Path) -> None:
    """What is downloaded is one SQLite file, for whoever has SQLite."""
    path = tmp_path / "orders.db"
    path.write_bytes(site.get(f"/v1/files/{table}/content").body)
    con = sqlite3.connect(path)
    assert con.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert con.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert con.execute("SELECT count(*), sum(n), sum(open) FROM rows").fetchone() == (
        *(ROWS, sum(range(ROWS)), sum(n % 3 > 0 for n in range(ROWS))),
    )
    con.close()


def test_deleted_and_gone(site: Server) -> None:
    """A table is deleted as a file; the version before it is the newest then."""
    first = imported(site, "goes", b"a\n1\n")
    second = imported(site, "goes", b"a\n2\n")
    assert site.get("/v1/tables/goes").json["id"] == second
    assert site.delete(f"/v1/files/{second}").status == 204
    assert site.get("/v1/tables/goes/rows").json["items"] == [{"a": 1}]
    assert site.delete(f"/v1/files/{first}").status == 204
    refused(site, "/v1/tables/goes", 404, "table-unknown")


def test_many_rows_do_not_hold_the_loop(site: Server) -> None:
    """A filter that lets nothing through looks at a bounded number of rows for each page."""
    rows = 400_000 if FULL else 120_000
    table = imported(site, "many", b"n\n" + b"".join(b"%d\n" % n for n in range(rows)))
    path = f"/v1/tables/{table}/rows?where={quote(f'n = {rows - 1}')}"
    found, count, begin = [], 0, time.monotonic()
    for page in pages(site, path):
        found += page["items"]
        count += 1
    assert found == [{"n": rows - 1}]
    assert count >= rows // 50_000
    assert time.monotonic() - begin < 60


def test_big_cells_make_short_pages(site: Server) -> None:
    """A page has a few MiB of text at most, and at least one row."""
    cell = b"x" * (900 << 10)
    table = imported(site, "big", b"text\n" + b"".join(cell + b"\n" for _ in range(12)))
    sizes = [len(page["items"]) for page in pages(site, f"/v1/tables/{table}/rows?limit=500")]
    assert sum(sizes) == 12
    assert 0 < max(sizes) <= 6
