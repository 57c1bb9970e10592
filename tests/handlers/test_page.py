"""The dashboard as it is sent: modules together, without comments, compressed."""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path

import pytest

from handlers import STATIC
from handlers.page import PageHandler, modules, together
from tests.harness import Server


@pytest.mark.parametrize("name", sorted(path.name for path in STATIC.iterdir()))
@pytest.mark.parametrize("takes", ["gzip, deflate, br", "identity", "gzip;q=0, *", "*;q=0.5"])
def test_files_of_the_page_are_compressed(site: Server, name: str, takes: str) -> None:
    """Each file comes as gzip to who takes it, and as it is to others; each has its own tag."""
    answer = site.get(f"/static/{name}", Accept_Encoding=takes)
    packed = answer.headers.get("Content-Encoding") == "gzip"
    assert packed == (takes in ("gzip, deflate, br", "*;q=0.5"))
    whole = PageHandler.version(STATIC / name).plain
    assert (gzip.decompress(answer.body) if packed else answer.body) == whole
    assert answer.headers["Vary"] == "Accept-Encoding"
    assert int(answer.headers["Content-Length"]) == len(answer.body)
    types = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg"}
    assert answer.headers["Content-Type"].startswith(types[name.rpartition(".")[2]])
    tag = answer.headers["Etag"]
    head = site.request("HEAD", f"/static/{name}", headers={"Accept-Encoding": takes})
    assert (head.status, head.headers["Etag"], head.body) == (200, tag, b"")
    again = site.get(f"/static/{name}", Accept_Encoding=takes, If_None_Match=tag)
    assert (again.status, again.body) == (304, b"")
    other = site.get(f"/static/{name}", Accept_Encoding="" if packed else "gzip")
    assert other.headers["Etag"] != tag


def test_modules_come_together() -> None:
    """One script has all modules but the worker's, each after what it needs, and no comment."""
    paths = modules(STATIC / "main.js")
    assert {path.name for path in paths} == {
        path.name for path in STATIC.glob("*.js") if path.name != "socket.js"
    }
    for i, path in enumerate(paths):
        needed = set(re.findall(r'from "\./([\w-]+\.js)"', path.read_text())) - {"socket.js"}
        assert needed <= {other.name for other in paths[:i]}
    sent = PageHandler.version(STATIC / "main.js").plain.decode()
    assert sent.startswith('import{serve}from"./socket.js"')
    assert re.findall(r"\b(?:import|export) ?[{\w]", sent) == ["import{"]
    for path in paths:
        first = path.read_text().splitlines()[0]
        assert first.startswith("// ")
        assert first[3:] not in sent


@pytest.mark.parametrize(
    "text",
    ["export default 1;\n", 'import "./other.js";\n', 'export { x } from "./other.js";\n'],
)
def test_what_is_written_otherwise_is_refused(tmp_path: Path, text: str) -> None:
    """A form of import or export that would be sent wrong is an error, not a broken page."""
    (tmp_path / "other.js").write_text("export const x = 1;\n")
    (tmp_path / "main.js").write_text(text)
    with pytest.raises(ValueError, match=r"main\.js"):
        together(tmp_path / "main.js")


@pytest.mark.parametrize("path", sorted(STATIC.glob("*.js")), ids=lambda path: path.name)
def test_no_template_is_inside_another(path: Path) -> None:
    """The one thing that would lose blanks of a text when it is sent: a template in a template."""
    for line in path.read_text().splitlines():
        depth = 0
        for mark in re.findall(r"\\`|`|\$\{|\}|\{", line):
            if mark == "`":
                assert depth <= 0, line
            inside = mark == "${" or (mark == "{" and depth > 0)
            depth += 1 if inside else -1 if mark == "}" and depth > 0 else 0


def test_a_changed_file_is_sent_anew(tmp_path: Path) -> None:
    """A change of any module shows at once, under another tag."""
    (tmp_path / "part.js").write_text("// Why.\nexport const text = `one  two`;\n")
    (tmp_path / "main.js").write_text('import { text } from "./part.js";\nalert(text);\n')
    first = PageHandler.version(tmp_path / "main.js")
    assert first is PageHandler.version(tmp_path / "main.js")
    assert b"`one  two`" in first.plain
    assert b"Why" not in first.plain
    assert gzip.decompress(first.packed) == first.plain
    (tmp_path / "part.js").write_text("export const text = `three`;\n")
    os.utime(tmp_path / "part.js", ns=(1, 1))
    second = PageHandler.version(tmp_path / "main.js")
    assert second.tag != first.tag
    assert b"three" in second.plain
