"""A local emulation of a Google Cloud Storage bucket.

TensorFlow and TensorStore send requests for https://*.googleapis.com through the proxy of the
environment. `serve` starts that proxy, with its own certificate, and answers from memory. As in a real
bucket, an object appears when its upload ends. Objects cannot be appended to, renamed, or seeked
while they are written.
"""

import contextlib
import http.server
import json
import pathlib
import re
import ssl
import tempfile
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

import trustme

NAME = "bucket"


class Bucket:
    """Objects by name.

    Each entry of `fail` answers one request with an HTTP status: the next one for an object whose name
    contains the first element.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.uploads: dict[str, tuple[str, bytes]] = {}
        self.lock = threading.Lock()
        self.fail: list[tuple[str, int]] = []  # part of an object's name, status

    def put(self, name: str, content: bytes) -> None:
        self.objects[name] = content
        self.generations[name] = self.generations.get(name, 0) + 1

    def size(self, name: str) -> int:
        return len(self.objects[name])

    def metadata(self, name: str) -> dict[str, str]:
        return {
            "name": name, "size": str(self.size(name)), "generation": str(self.generations[name]),
            "updated": "2026-01-01T00:00:00.000Z",
        }  # fmt: skip


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise every answer waits 40 ms for an acknowledgement
    bucket: Bucket
    tls: ssl.SSLContext

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_CONNECT(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        self.connection = self.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)
        self.close_connection = False

    def answer(self, status: int, content: bytes | dict[str, Any] = b"", **headers: str) -> None:
        if isinstance(content, dict):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if status not in (304, 308):
            self.wfile.write(content)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def serve(self) -> None:
        url, body = urllib.parse.urlsplit(self.path), self.body()
        query = dict(urllib.parse.parse_qsl(url.query))
        with self.bucket.lock:
            self.route(url.path, query, body)

    do_GET = do_POST = do_PUT = do_DELETE = serve  # noqa: N815

    def route(self, path: str, query: dict[str, str], body: bytes) -> None:
        bucket = self.bucket
        if path == f"/upload/storage/v1/b/{NAME}/o":
            return self.upload(query, body)
        if match := re.fullmatch(
            r"(?:/upload)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+)(?:/rewriteTo/b/[^/]+/o/([^/]+))?)?)?", path
        ):
            bucket_name, name, target = match[1], match[2], match[3]
        elif match := re.fullmatch(r"/([^/]+)/(.+)", path):  # the XML API, used for reading only
            bucket_name, name, target = match[1], match[2], None
            query["alt"] = "media"
        else:
            return self.answer(501)
        if bucket_name != NAME:
            return self.answer(404, {"error": {"code": 404, "message": "The specified bucket does not exist."}})
        if name is None:
            return self.list(query) if path.endswith("/o") else self.answer(200, {"name": NAME, "location": "HERE"})
        name = urllib.parse.unquote(name)
        for i, (part, status) in enumerate(bucket.fail):
            if part in name:
                del bucket.fail[i]
                return self.answer(status)
        if name not in bucket.objects:
            return self.answer(404, {"error": {"code": 404, "message": "No such object"}})
        if self.command == "DELETE":
            del bucket.objects[name]
            return self.answer(204)
        if target is not None:
            bucket.put(urllib.parse.unquote(target), bucket.objects[name])
            return self.answer(200, {"done": True})
        if query.get("alt") == "media":
            return self.read(name, query)
        return self.answer(200, bucket.metadata(name))

    def read(self, name: str, query: dict[str, str]) -> None:
        content, generation = self.bucket.objects[name], str(self.bucket.generations[name])
        if query.get("ifGenerationNotMatch") == generation:
            return self.answer(304)
        headers = {"x-goog-generation": generation, "x-goog-hash": ""}
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not byte_range:
            return self.answer(200, content, **headers)
        first, last = int(byte_range[1]), min(int(byte_range[2] or len(content)), len(content) - 1)
        if first >= len(content):
            return self.answer(416)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self.answer(206, content[first : last + 1], **headers)

    def list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, end = query.get("startOffset", ""), query.get("endOffset")
        items, prefixes = [], []
        for name in sorted(self.bucket.objects):
            if not name.startswith(prefix) or name < first or (end and name >= end):
                continue
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            if cut < 0:
                items.append(self.bucket.metadata(name))
            elif (folder := name[: cut + 1]) not in prefixes:
                prefixes.append(folder)
        self.answer(200, {"items": items, "prefixes": prefixes})

    def upload(self, query: dict[str, str], body: bytes) -> None:
        bucket, name = self.bucket, query.get("name", "")
        if "upload_id" in query:
            name, content = bucket.uploads[query["upload_id"]]
            bucket.uploads[query["upload_id"]] = (name, content := content + body)
            total = (self.headers.get("Content-Range") or "/*").rpartition("/")[2]
            if total != "*" and len(content) < int(total):
                return self.answer(308, Range=f"bytes=0-{len(content) - 1}")
            body = content
        elif "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != (
            bucket.generations[name] if name in bucket.objects else 0
        ):
            return self.answer(412)
        elif query.get("uploadType") == "resumable":
            number = str(len(bucket.uploads))
            bucket.uploads[number] = (name, b"")
            host = self.headers["Host"]
            return self.answer(
                200, Location=f"https://{host}/upload/storage/v1/b/{NAME}/o?uploadType=resumable&upload_id={number}"
            )
        bucket.put(name, body)
        return self.answer(200, bucket.metadata(name))


@contextlib.contextmanager
def serve() -> Iterator[tuple[Bucket, dict[str, str]]]:
    """Serves the bucket gs://bucket. Yields it and the environment variables of its clients."""
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("www.googleapis.com", "storage.googleapis.com").configure_cert(tls)
    bucket = Bucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket, "tls": tls})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with tempfile.TemporaryDirectory() as folder:
        certificate = pathlib.Path(folder) / "ca.pem"
        authority.cert_pem.write_to_path(str(certificate))
        proxy = f"http://127.0.0.1:{server.server_address[1]}"
        yield (
            bucket,
            {
                "https_proxy": proxy, "HTTPS_PROXY": proxy, "no_proxy": "", "NO_PROXY": "",
                "CURL_CA_BUNDLE": str(certificate), "TENSORSTORE_CA_BUNDLE": str(certificate),
                "STORAGE_EMULATOR_HOST": proxy,  # google-cloud-storage then needs no credentials
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token", "NO_GCE_CHECK": "true",
                "GCS_READ_CACHE_BLOCK_SIZE_MB": "1",  # TensorFlow allocates this size, by default 64 MiB, for every file
            },
        )  # fmt: skip
    server.shutdown()
    thread.join()
