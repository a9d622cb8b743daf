"""A fake Cloud Storage server: its JSON interface over HTTP, with objects in memory, in this process.

Objects exist completely or not at all; there are no folders, appends, renames or locks. It serves both
clients of a run: gcsfs (behind etils' paths) and tensorstore (behind Orbax).
"""

import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

_OBJECT = r"(?:/download)?/storage/v1/b/[^/]+/o/([^/]+)"
_COPY = r"/storage/v1/b/[^/]+/o/([^/]+)/(?:rewriteTo|copyTo)/b/[^/]+/o/([^/]+)"
_MOVE = r"/storage/v1/b/[^/]+/o/([^/]+)/moveTo/o/([^/]+)"
_WHEN = "2026-01-01T00:00:00Z"


class Bucket:
    """A context manager that serves on a free port; `objects` maps names to bytes, `broken` fails writes."""

    def __init__(self):
        self.objects, self.generations, self.uploads = {}, {}, {}
        self.broken = False
        self._lock, self._count = threading.Lock(), 0
        handler = type("Handler", (_Handler,), {"bucket": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {  # where the clients look
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        }

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def put(self, name, content):
        with self._lock:
            self._count += 1
            self.objects[name], self.generations[name] = content, self._count
        return self.describe(name)

    def describe(self, name):
        content = self.objects[name]
        return {
            "kind": "storage#object",
            "bucket": "bucket",
            "name": name,
            "size": str(len(content)),
            "generation": str(self.generations[name]),
            "etag": hashlib.md5(content).hexdigest(),
            "timeCreated": _WHEN,
            "updated": _WHEN,
        }

    def listing(self, prefix="", delimiter="", start="", end=""):
        names = [
            n for n in sorted(self.objects) if n.startswith(prefix) and n >= start and (not end or n < end)
        ]
        items, folders = [], {}
        for name in names:
            folder, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            if found:
                folders[prefix + folder + delimiter] = None
            else:
                with contextlib.suppress(KeyError):  # deleted meanwhile
                    items.append(self.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": list(folders)}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is one packet: a second would wait until the first is acknowledged
    bucket: Bucket

    def log_message(self, *arguments):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # a client that was killed
            super().handle()

    def _answer(self, status, body=b"", **headers):
        headers = {"Content_Type": "application/json"} | headers
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        for key, value in (headers | {"Content_Length": str(len(body))}).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status, message):
        self._answer(status, {"error": {"code": status, "message": message}})

    def _handle(self):
        url = urllib.parse.urlsplit(self.path)
        query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.bucket.broken and self.command in ("POST", "PUT"):
            self._refuse(403, "the bucket is out of order")
        elif url.path.startswith("/upload/"):
            self._upload(url.path, query, body)
        elif url.path.startswith("/batch/"):
            self._delete_many(body)
        elif match := re.fullmatch(_COPY, url.path):
            self._copy(*map(urllib.parse.unquote, match.groups()))
        elif match := re.fullmatch(_MOVE, url.path):
            source, target = map(urllib.parse.unquote, match.groups())
            self._copy(source, target)
            self.bucket.objects.pop(source, None)
        elif match := re.fullmatch(_OBJECT, url.path):
            self._object(urllib.parse.unquote(match[1]), query)
        elif re.fullmatch(r"/storage/v1/b/[^/]+/o/?", url.path):
            keys = ("prefix", "delimiter", "startOffset", "endOffset")
            self._answer(200, self.bucket.listing(*(query.get(key, "") for key in keys)))
        elif re.fullmatch(r"/storage/v1/b/[^/]+/?", url.path):
            self._answer(200, {"kind": "storage#bucket", "name": "bucket", "location": "here"})
        else:
            self._refuse(404, "no such place")

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = _handle  # noqa: N815

    def _object(self, name, query):
        content = self.bucket.objects.get(name)
        if content is None:
            self._refuse(404, "no such object")
        elif self.command == "DELETE":
            self.bucket.objects.pop(name, None)
            self._answer(204)
        elif query.get("alt") != "media":
            self._answer(200, self.bucket.describe(name))
        elif query.get("ifGenerationNotMatch") == str(self.bucket.generations[name]):
            self._answer(304)
        else:
            self._content(content, str(self.bucket.generations[name]))

    def _content(self, content, generation):
        headers = {"x_goog_generation": generation, "Content_Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self._answer(200, content, **headers)
            return
        size = len(content)
        start = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
        stop = min(int(wanted[2]) + 1 if wanted[1] and wanted[2] else size, size)
        if start >= size:
            self._answer(416, b"", Content_Range=f"bytes */{size}")
            return
        self._answer(206, content[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{size}", **headers)

    def _upload(self, path, query, body):
        name = query.get("name")
        if "upload_id" in query:
            name, before = self.bucket.uploads[query["upload_id"]]
            body = before + body
            if (self.headers.get("Content-Range") or "").endswith("/*"):  # more to come
                self.bucket.uploads[query["upload_id"]] = name, body
                self._answer(308, b"", Range=f"bytes=0-{len(body) - 1}")
                return
        elif query.get("uploadType") == "resumable":
            number = str(len(self.bucket.uploads))
            self.bucket.uploads[number] = name or json.loads(body)["name"], b""
            self._answer(200, {}, Location=f"{self.bucket.url}{path}?upload_id={number}")
            return
        elif query.get("uploadType") == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, described, content, _ = body.split(b"--" + boundary)
            line = b"\r\n" if b"\r\n\r\n" in described else b"\n"
            name = name or json.loads(described.split(2 * line, 1)[1])["name"]
            body = content.split(2 * line, 1)[1].removesuffix(line)
        present = str(self.bucket.generations[name]) if name in self.bucket.objects else "0"
        if query.get("ifGenerationMatch", present) != present:
            self._refuse(412, "another generation")
        else:
            self._answer(200, self.bucket.put(name, body))

    def _copy(self, source, target):
        if source not in self.bucket.objects:
            self._refuse(404, "no such object")
        else:
            self._answer(
                200, {"done": True, "resource": self.bucket.put(target, self.bucket.objects[source])}
            )

    def _delete_many(self, body):
        parts = []
        for path in re.findall(rb"DELETE (\S+) HTTP", body):
            name = urllib.parse.unquote(path.decode().split("/o/", 1)[1].split("?")[0])
            status = 204 if self.bucket.objects.pop(name, None) is not None else 404
            parts.append(f"--part\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} X\r\n\r\n\r\n")
        body = "".join(parts) + "--part--"
        self._answer(200, body.encode(), Content_Type="multipart/mixed; boundary=part")
