"""Uploads one file by tuspy; orders and lines as in tus_js.mjs."""

from __future__ import annotations

import json
import sys
from typing import Any

from tusclient.client import TusClient
from tusclient.exceptions import TusCommunicationError
from tusclient.storage.filestorage import FileStorage


def main(orders: dict[str, Any]) -> dict[str, Any]:
    """Upload; the last line."""
    try:
        uploader = TusClient(orders["endpoint"]).uploader(
            orders["file"],
            metadata={"filename": orders["name"]},
            retries=200,
            retry_delay=0.05,
            store_url=True,
            url_storage=FileStorage(orders["memory"]),  # type: ignore[no-untyped-call]
            **orders["options"],
        )
        uploader.upload()
    except TusCommunicationError as error:
        return {"error": f"{error.status_code} {error} {error.response_content!r}"}
    return {"done": uploader.url}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
