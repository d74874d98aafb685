"""A bucket on this machine: as much of S3's protocol as reading needs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit


@contextmanager
def bucket(objects: Mapping[str, bytes], refuse: tuple[int, str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve one bucket of any name.

    Args:
        objects: Contents by key.
        refuse: Status and error code that every request is answered with; the message repeats who asked.

    Yields:
        The endpoint, and the requests so far.
    """
    seen = list[str]()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # an answer in one piece: the client waits for acknowledgements otherwise

        def do_GET(self) -> None:
            seen.append(f"{self.command} {self.path}")
            if refuse is not None:
                asked = self.headers.get("Authorization", "nobody")
                self.answer(refuse[0], f"<Error><Code>{refuse[1]}</Code><Message>not you, {asked}</Message></Error>")
                return
            url = urlsplit(self.path)
            key = unquote(url.path).lstrip("/").partition("/")[2]
            query = parse_qs(url.query)
            if not key:
                self.answer(200, listing(objects, query.get("prefix", [""])[0], "delimiter" in query))
            elif key not in objects:
                self.answer(404, "<Error><Code>NoSuchKey</Code></Error>")
            else:
                data = objects[key]
                span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                part = data[int(span[1]) : int(span[2]) + 1] if span else data
                self.answer(206 if span else 200, part, "application/octet-stream", len(part))

        do_HEAD = do_GET  # noqa: N815

        def answer(self, status: int, body: str | bytes, kind: str = "application/xml", length: int = -1) -> None:
            data = body.encode() if isinstance(body, str) else body
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(max(length, len(data))))
            self.send_header("Last-Modified", "Mon, 02 Feb 2026 10:00:00 GMT")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def listing(objects: Mapping[str, bytes], prefix: str, delimited: bool) -> str:
    """The answer to ``ListObjectsV2``; times with fractions of a second, which single answers lack."""
    files, folders = list[str](), set[str]()
    for key, data in sorted(objects.items()):
        if not key.startswith(prefix):
            continue
        rest = key[len(prefix) :]
        if delimited and "/" in rest:
            folders.add(prefix + rest.partition("/")[0] + "/")
        else:
            files.append(
                f"<Contents><Key>{key}</Key><Size>{len(data)}</Size>"
                "<LastModified>2026-02-02T10:00:00.123Z</LastModified></Contents>"
            )
    common = "".join(f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>" for name in sorted(folders))
    return (
        f"<ListBucketResult><Prefix>{prefix}</Prefix><KeyCount>{len(files) + len(folders)}</KeyCount>"
        f"<IsTruncated>false</IsTruncated>{''.join(files)}{common}</ListBucketResult>"
    )
