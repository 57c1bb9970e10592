"""Uploads one file, or its parts, by aiotus; orders and lines as in tus_js.mjs.

aiotus has no memory of its own: who wants to go on keeps the URL, which comes back as ``url``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import aiotus
from aiotus.core import upload_buffer
from yarl import URL

PATIENCE = aiotus.RetryConfiguration(retry_attempts=200, max_retry_period_seconds=0.05)


def tell(**line: Any) -> None:
    """Say what happens."""
    print(json.dumps(line), flush=True)


async def created(_: object, __: object, end: aiohttp.TraceRequestEndParams) -> None:
    """Tell the URL as soon as it is known; aiotus returns it only at the end."""
    if end.method == "POST" and end.response.status == 201:
        tell(url=str(end.url.join(URL(end.response.headers["Location"]))))


def split(path: Path, n: int) -> list[Path]:
    """The file as ``n`` files in the working directory; as it is, if that is one."""
    if n == 1:
        return [path]
    paths = []
    length = -(-path.stat().st_size // n)
    with path.open("rb") as whole:
        for number in range(n):
            paths.append(Path(f"part {number}"))
            paths[-1].write_bytes(whole.read(length))
    return paths


async def upload(orders: dict[str, Any], session: aiohttp.ClientSession) -> URL | None:
    """Upload; the URL, or nothing if aiotus has given up and logged why."""
    endpoint, url, options = orders["endpoint"], orders["url"], orders["options"]
    metadata = {"filename": orders["name"].encode()}
    parts = options.pop("parts", 1)
    with ExitStack() as stack:
        files = [
            stack.enter_context(path.open("rb")) for path in split(Path(orders["file"]), parts)
        ]
        if parts > 1:
            return await aiotus.upload_multiple(
                endpoint, files, metadata, session, PATIENCE, **options
            )
        if url is None:
            return await aiotus.upload(endpoint, files[0], metadata, session, PATIENCE, **options)
        await upload_buffer(session, URL(url), files[0], **options)
        return URL(url)


async def main(orders: dict[str, Any]) -> None:
    """Upload, and tell."""
    trace = aiohttp.TraceConfig()
    trace.on_request_end.append(created)
    async with aiohttp.ClientSession(trace_configs=[trace]) as session:
        url = await upload(orders, session)
    tell(**({"error": "aiotus has given up"} if url is None else {"done": str(url)}))


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
