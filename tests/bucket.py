"""A stand-in for Cloud Storage: its JSON interface over HTTP, objects in memory, in this process.

Objects are whole or not there; there are no folders, no appends, no renames, no locks. Both clients that a run
uses speak to it: gcsfs (behind etils' paths) and tensorstore (behind Orbax).
"""

import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse


class Bucket:
    """As a context: serves on a free port. `objects` maps names to bytes; `broken` makes writes fail."""

    def __init__(self):
        self.objects, self.generations = {}, {}
        self.broken = False
        self.requests = 0
        self._uploads, self._lock, self._count = {}, threading.Lock(), 0
        handler = type("Handler", (_Handler,), {"bucket": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # what both clients read
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GCE_METADATA_ROOT": "metadata.invalid",
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
            "timeCreated": "2026-01-01T00:00:00Z",
            "updated": "2026-01-01T00:00:00Z",
        }

    def listing(self, prefix, delimiter, start, end):
        names = sorted(n for n in list(self.objects) if n.startswith(prefix) and n >= start)
        names = [n for n in names if not end or n < end]
        items, folders = [], []
        for name in names:
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folder = prefix + rest.split(delimiter)[0] + delimiter
                if folder not in folders:
                    folders.append(folder)
            else:
                with contextlib.suppress(KeyError):
                    items.append(self.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": folders}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def log_message(self, *arguments):
        pass

    def _answer(self, status, body=b"", **headers):
        body = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if "Content-Type" not in headers:
            self.send_header("Content-Type", "application/json")
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(BrokenPipeError):  # a client that ended
                self.wfile.write(body)

    def _handle(self):
        self.bucket.requests += 1
        url = urllib.parse.urlsplit(self.path)
        query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.bucket.broken and self.command in ("POST", "PUT"):
            self._answer(503, {"error": {"code": 503, "message": "the bucket is out of order"}})
            return
        path = url.path
        if path.startswith("/upload/"):
            self._upload(path, query, body)
        elif path.startswith("/batch/"):
            self._batch(body)
        elif match := re.fullmatch(
            r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/[^/]+/o/([^/]+)", path
        ):
            source, target = map(urllib.parse.unquote, match.groups()[1:])
            if source not in self.bucket.objects:
                self._missing()
            else:
                resource = self.bucket.put(target, self.bucket.objects[source])
                self._answer(200, {"done": True, "resource": resource})
        elif match := re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)", path):
            self._object(urllib.parse.unquote(match[2]), query)
        elif re.fullmatch(r"/storage/v1/b/([^/]+)/o/?", path):
            keys = ("prefix", "delimiter", "startOffset", "endOffset")
            self._answer(200, self.bucket.listing(*(query.get(key, "") for key in keys)))
        elif re.fullmatch(r"/storage/v1/b/([^/]+)/?", path):
            self._answer(200, {"kind": "storage#bucket", "name": "bucket", "location": "here"})
        else:
            self._missing()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = _handle  # noqa: N815

    def _missing(self):
        self._answer(404, {"error": {"code": 404, "message": "no such object"}})

    def _object(self, name, query):
        content = self.bucket.objects.get(name)
        if content is None:
            self._missing()
        elif self.command == "DELETE":
            self.bucket.objects.pop(name, None)
            self._answer(204)
        elif query.get("alt") != "media":
            self._answer(200, self.bucket.describe(name))
        elif query.get("ifGenerationNotMatch") == str(self.bucket.generations[name]):
            self._answer(304)
        else:
            self._content(name, content)

    def _content(self, name, content):
        headers = {
            "x_goog_generation": str(self.bucket.generations[name]),
            "Content_Type": "application/octet",
        }
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self._answer(200, content, **headers)
            return
        start = int(wanted[1]) if wanted[1] else max(0, len(content) - int(wanted[2]))
        stop = min(int(wanted[2]) + 1 if wanted[1] and wanted[2] else len(content), len(content))
        if start >= len(content):
            self._answer(416, b"", Content_Range=f"bytes */{len(content)}")
            return
        headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._answer(206, content[start:stop], **headers)

    def _upload(self, path, query, body):
        kind, name = query.get("uploadType"), query.get("name")
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, described, content, _ = body.split(b"--" + boundary)
            name = (
                name
                or json.loads(described.split(b"\r\n\r\n" if b"\r\n\r\n" in described else b"\n\n", 1)[1])[
                    "name"
                ]
            )
            separator = b"\r\n\r\n" if b"\r\n\r\n" in content else b"\n\n"
            body = content.split(separator, 1)[1]
            body = body[: -len(separator) // 2]
        elif "upload_id" not in query and kind == "resumable":
            name = name or json.loads(body)["name"]
            number = str(len(self.bucket._uploads))
            self.bucket._uploads[number] = name, b""
            place = f"{self.bucket.url}{path}?uploadType=resumable&upload_id={number}"
            self._answer(200, {}, Location=place)
            return
        elif "upload_id" in query:
            name, before = self.bucket._uploads[query["upload_id"]]
            body = before + body
            if (self.headers.get("Content-Range") or "").endswith("/*"):  # more to come
                self.bucket._uploads[query["upload_id"]] = name, body
                self._answer(308, b"", Range=f"bytes=0-{len(body) - 1}")
                return
        if (wanted := query.get("ifGenerationMatch")) is not None:
            if str(self.bucket.generations.get(name, 0) if name in self.bucket.objects else 0) != wanted:
                self._answer(412, {"error": {"code": 412, "message": "another generation"}})
                return
        self._answer(200, self.bucket.put(name, body))

    def _batch(self, body):
        parts = []
        for path in re.findall(rb"DELETE (\S+) HTTP", body):
            name = urllib.parse.unquote(path.decode().split("/o/", 1)[1].split("?")[0])
            found = self.bucket.objects.pop(name, None) is not None
            parts.append(
                f"--part\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {204 if found else 404} X\r\n\r\n\r\n"
            )
        self._answer(
            200, ("".join(parts) + "--part--").encode(), Content_Type="multipart/mixed; boundary=part"
        )
