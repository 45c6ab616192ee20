"""A web server of files with byte ranges, whose faults a test chooses, and the settings of a local S3 store."""

from __future__ import annotations

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

# The range that asks whether there are ranges.
PROBE = "bytes=1-1"


class Request(NamedTuple):
    """What a client asked for: HEAD or GET, the path, and the range as it stands in the header."""

    method: str
    path: str
    range: str


class FileServer:
    """Serves the files of a folder on a port of its own.

    Attributes:
        root: the folder.
        url: its address.
        requests: all requests in order.
        faults: of the next GET requests for content: "drop", "short", "long", "silent" (no answer until the client gives
            up), or an HTTP status.
        has_ranges: whether ranges are obeyed; else each answer is the whole file.
        refused: the status of every request, HEAD too, None for the right one.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.reset()
        files = self

        class Handler(_Handler):
            server_files = files

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def reset(self) -> None:
        """Forget the requests and faults of the test before."""
        self.requests: list[Request] = []
        self.faults: list[str | int] = []
        self.has_ranges = True
        self.refused: int | None = None

    def reads(self) -> list[Request]:
        """Return the GET requests for content."""
        return [r for r in self.requests if r.method == "GET" and r.range != PROBE]

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_files: FileServer

    def do_HEAD(self) -> None:
        """Answer with the headers of a file."""
        self._answer(is_head=True)

    def do_GET(self) -> None:
        """Answer with a file, or a range of it, or with the next fault."""
        self._answer(is_head=False)

    def _answer(self, is_head: bool) -> None:
        files = self.server_files
        asked = self.headers.get("Range", "")
        files.requests.append(Request(self.command, self.path, asked))
        path = files.root / self.path.lstrip("/").partition("?")[0]
        status = 404 if files.refused is None and not path.is_file() else files.refused
        if status is not None:
            return self._refuse(status)
        content = path.read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        status, match = 200, re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        if match is not None and files.has_ranges:
            status, content = 206, content[int(match[1]) : int(match[2]) + 1]
        is_read = not is_head and asked != PROBE
        fault = files.faults.pop(0) if files.faults and is_read else ""
        if isinstance(fault, int):
            return self._refuse(fault)
        if fault == "silent":
            # The end of the connection; a request behind this one would come here too.
            self.connection.recv(1)
            self.close_connection = True
            return None
        if fault == "short":
            # A whole answer by its own header, of fewer bytes than the range.
            content = content[:-1]
        if fault == "long":
            content += b"?"
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", tag)
        self.end_headers()
        if fault == "drop":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif not is_head:
            self.wfile.write(content)

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""
