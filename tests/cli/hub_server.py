"""A Hugging Face Hub on this machine, with the few routes that fetching a model needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Models by name, each a directory; ``fetched`` lists the files that were sent."""

    def __init__(self, models: dict[str, Path]) -> None:
        self.models = models
        self.fetched: list[str] = []
        self.url = ""

    @contextmanager
    def running(self) -> Iterator[Hub]:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(?:/.*)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        root = self.hub.models.get(match[1]) if match else None
        if match is None or root is None:
            self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, body)
            return
        revision = (api[3] if api else match[2]) or "main"
        if revision not in ("main", "v1", COMMIT):
            self._send(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"}, body)
        elif api is not None:
            self._send(200, json.dumps(_tree(root) if api[2] == "tree" else _info(api[1], root)).encode(), {}, body)
        else:
            self._send_file(root / match[3], match[3], body)

    def _send_file(self, path: Path, name: str, body: bool) -> None:
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            return
        data = path.read_bytes()
        if body:
            self.hub.fetched.append(name)
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        self._send(200, data, headers, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json" if status != 200 or not headers else "binary/octet-stream")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def _info(name: str, root: Path) -> dict[str, object]:
    siblings = [{"rfilename": path.relative_to(root).as_posix()} for path in _files(root)]
    return {"_id": "1", "id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}


def _tree(root: Path) -> list[dict[str, object]]:
    return [
        {
            "type": "file",
            "oid": _digest(path.read_bytes())[:40],
            "size": path.stat().st_size,
            "path": path.relative_to(root).as_posix(),
        }
        for path in _files(root)
    ]
