"""A first look at the whole way of a file and of a process."""

from __future__ import annotations

from tests.harness import Server, form


def test_a_form_upload_is_stored_and_read_again(server: Server) -> None:
    """A file sent as a form comes back byte for byte."""
    data = bytes(range(256)) * 5000
    body, content_type = form(("file", "data.bin", data))
    answer = server.request("POST", "/upload", body, {"Content-Type": content_type})
    assert answer.status == 200, answer
    content = server.get(f"/v1/files/{answer.json['id']}/content")
    assert content.body == data


def test_a_process_runs_to_its_end(server: Server) -> None:
    """A process that is started by one GET succeeds."""
    job = server.get("/demo/process/?kind=count&steps=20&delay_s=0.01").json
    assert server.wait_for(job["id"], "succeeded")["result"]["data"] == {"counted": 20}
