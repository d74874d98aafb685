"""A bucket on this machine: as much of S3's protocol as reading and writing need, and its ways to fail."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LONG_AGO = 1770026400.123  # 2 February 2026
Fault = Callable[[str, str], int]  # of method and path: a status, CUT, or 0 for none
CUT = -1  # the connection ends in the middle of the body


@dataclass
class Bucket:
    """What the server holds, and how it behaves.

    Attributes:
        endpoint: Where it listens.
        objects: Contents by key; one bucket of any name.
        seen: The requests so far, ``METHOD path``.
        page: Most keys of one listing.
        fault: Asked before every request.
        conditional: Whether ``If-None-Match`` is heeded.
    """

    endpoint: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    page: int = 1000
    fault: Fault = lambda method, path: 0
    code: str = "SlowDown"
    conditional: bool = True
    changed: dict[str, float] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def put(self, key: str, data: bytes) -> None:
        with self.lock:
            self.objects[key], self.changed[key] = data, time.time()

    def when(self, key: str) -> float:
        return self.changed.get(key, LONG_AGO)

    def count(self, start: str) -> int:
        return sum(request.startswith(start) for request in self.seen)

    def keys(self, below: str = "") -> list[str]:
        """Objects, without the empty ones that stand for folders."""
        with self.lock:
            return sorted(key for key in self.objects if key.startswith(below) and not key.endswith("/"))


@contextmanager
def bucket(objects: Mapping[str, bytes], refuse: tuple[int, str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve one bucket of any name.

    Args:
        objects: Contents by key.
        refuse: Status and error code that every request is answered with; the message repeats who asked.

    Yields:
        The endpoint, and the requests so far.
    """
    with writable(objects) as held:
        if refuse is not None:
            held.fault, held.code = (lambda method, path: refuse[0]), refuse[1]
        yield held.endpoint, held.seen


@contextmanager
def writable(objects: Mapping[str, bytes] | None = None) -> Iterator[Bucket]:
    """Serve one bucket that can be written to."""
    held = Bucket(objects=dict(objects or {}))
    server = _Server(("127.0.0.1", 0), type("Bound", (_Handler,), {"held": held}))
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    held.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield held
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed in the middle of a request is no news."""


class _CutError(Exception):
    """The connection is to be dropped."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # an answer in one piece: the client waits for acknowledgements otherwise
    held: Bucket

    def handle_expect_100(self) -> bool:
        self.send_response_only(100)
        self.end_headers()
        self.wfile.flush()
        return True

    def serve(self) -> None:
        held = self.held
        held.seen.append(f"{self.command} {self.path}")
        self.url = urlsplit(self.path)
        self.query = parse_qs(self.url.query, keep_blank_values=True)
        self.key = unquote(self.url.path).lstrip("/").partition("/")[2]
        status = held.fault(self.command, self.path)
        try:
            body = self.body(cut=status == CUT)
        except _CutError:
            self.close_connection = True
            self.connection.close()
            return
        if status:
            asked = self.headers.get("Authorization", "nobody")
            self.answer(status, f"<Error><Code>{held.code}</Code><Message>not you, {asked}</Message></Error>")
            return
        getattr(self, f"on_{self.command.lower()}")(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve  # noqa: N815

    def on_get(self, body: bytes) -> None:
        held = self.held
        if not self.key:
            with held.lock:
                self.answer(200, listing(held, {name: values[0] for name, values in self.query.items()}))
        elif (data := held.objects.get(self.key)) is None:
            self.answer(404, "<Error><Code>NoSuchKey</Code></Error>")
        else:
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            part = data[int(span[1]) : int(span[2]) + 1] if span else data
            self.answer(206 if span else 200, part, "application/octet-stream", self.about(data))

    on_head = on_get

    def on_put(self, body: bytes) -> None:
        held = self.held
        if "uploadId" in self.query:
            held.uploads[self.query["uploadId"][0]][int(self.query["partNumber"][0])] = body
        elif self.headers.get("x-amz-copy-source"):
            source = unquote(self.headers["x-amz-copy-source"]).lstrip("/").partition("/")[2]
            held.put(self.key, held.objects[source])
            self.answer(200, f"<CopyObjectResult><ETag>{etag(held.objects[source])}</ETag></CopyObjectResult>")
            return
        else:
            if held.conditional and self.headers.get("If-None-Match") == "*" and self.key in held.objects:
                self.answer(412, "<Error><Code>PreconditionFailed</Code></Error>")
                return
            held.put(self.key, body)
        self.answer(200, b"", about={"ETag": etag(body)})

    def on_post(self, body: bytes) -> None:
        held = self.held
        if "uploads" in self.query:
            name = f"upload-{len(held.uploads)}"
            held.uploads[name] = {}
            self.answer(
                200, f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>"
            )
        elif "uploadId" in self.query:
            parts = held.uploads.pop(self.query["uploadId"][0])
            wanted = [int(number) for number in re.findall(rb"<PartNumber>(\d+)<", body)]
            held.put(self.key, b"".join(parts[number] for number in wanted))
            about = f"<CompleteMultipartUploadResult><ETag>{etag(held.objects[self.key])}</ETag>"
            self.answer(200, about + "</CompleteMultipartUploadResult>")
        else:
            with held.lock:
                for name in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                    held.objects.pop(name, None)
            self.answer(200, "<DeleteResult></DeleteResult>")

    def on_delete(self, body: bytes) -> None:
        if "uploadId" in self.query:
            self.held.uploads.pop(self.query["uploadId"][0], None)
        else:
            with self.held.lock:
                self.held.objects.pop(self.key, None)
        self.answer(204, b"")

    def body(self, cut: bool) -> bytes:
        """The body, whether sent with its length or in chunks, signed in chunks of their own or not."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = self.chunks(cut)
        else:
            length = int(self.headers.get("Content-Length") or 0)
            data = self.rfile.read(length // 2 if cut else length)
        if cut:
            raise _CutError
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            found, place = list[bytes](), 0
            while True:
                end = data.index(b"\r\n", place)
                size = int(data[place:end].split(b";")[0], 16)
                if not size:
                    return b"".join(found)
                found.append(data[end + 2 : end + 2 + size])
                place = end + 2 + size + 2
        return data

    def chunks(self, cut: bool) -> bytes:
        found = list[bytes]()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found.append(self.rfile.read(size))
            self.rfile.readline()
            if cut:
                raise _CutError
        self.rfile.readline()
        return b"".join(found)

    def about(self, data: bytes) -> dict[str, str]:
        return {"ETag": etag(data), "Last-Modified": formatdate(int(self.held.when(self.key)), usegmt=True)}

    def answer(
        self, status: int, body: str | bytes, kind: str = "application/xml", about: dict[str, str] | None = None
    ) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
        for name, value in (about or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@lru_cache(maxsize=4096)
def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def listing(held: Bucket, query: Mapping[str, str]) -> str:
    """The answer to ``ListObjectsV2``; times with fractions of a second, which single answers lack."""
    prefix, start = query.get("prefix", ""), query.get("continuation-token", query.get("start-after", ""))
    most = min(held.page, int(query.get("max-keys", "1000")))
    files, folders, last, more = list[str](), set[str](), "", False
    for key, data in sorted(held.objects.items()):
        rest = key[len(prefix) :]
        folder = prefix + rest.partition("/")[0] + "/" if query.get("delimiter") and "/" in rest else ""
        if not key.startswith(prefix) or key <= start or (folder and folder <= start and start.startswith(folder)):
            continue
        if folder in folders:
            continue
        if len(files) + len(folders) >= most:
            more = True
            break
        last = folder + "\uffff" if folder else key
        if folder:
            folders.add(folder)
        else:
            when = held.when(key)
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(when)) + f".{int(when % 1 * 1000):03d}Z"
            files.append(
                f"<Contents><Key>{key}</Key><Size>{len(data)}</Size><ETag>{etag(data)}</ETag>"
                f"<LastModified>{stamp}</LastModified></Contents>"
            )
    common = "".join(f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>" for name in sorted(folders))
    token = f"<NextContinuationToken>{last}</NextContinuationToken>" if more else ""
    return (
        f"<ListBucketResult><Prefix>{prefix}</Prefix><KeyCount>{len(files) + len(folders)}</KeyCount>"
        f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(files)}{common}</ListBucketResult>"
    )
