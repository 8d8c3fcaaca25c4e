"""A server on this machine that answers as the Hugging Face Hub does, for what downloading a model needs.

It speaks repository information, trees and files with ETag, Range and X-Repo-Commit, and the Hub's error codes.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = 100  # bytes from which a file counts as kept in LFS


@dataclass
class Revision:
    """The files of one commit, and the branches and tags that point at it."""

    files: dict[str, bytes]
    names: tuple[str, ...] = ("main",)
    sizes: dict[str, int] = field(default_factory=dict)  # where the listing shall lie

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """What the server holds, and what it was asked."""

    endpoint: str
    repositories: dict[str, list[Revision]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)  # files whose connection breaks half way
    status: int = 200  # another: all that is answered
    requests: list[tuple[str, str]] = field(default_factory=list)

    def fetched(self) -> list[str]:
        """The files whose bytes were asked for since the last call, in order of their names."""
        names = [path.partition("/resolve/")[2].partition("/")[2] for verb, path in self.requests if verb == "GET"]
        self.requests.clear()
        return sorted(filter(None, names))

    def find(self, repo: str, name: str) -> Revision | None:
        for revision in self.repositories[repo]:
            if name in (*revision.names, revision.commit):
                return revision
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        words = path.strip("/").split("/")
        api = words[:2] == ["api", "models"]
        words = words[2:] if api else words
        repo, words = "/".join(words[:2]), words[2:] or ["revision", "main"]
        if self.hub.status != 200:
            self._fail(self.hub.status, "")
        elif repo not in self.hub.repositories:
            self._fail(401, "RepoNotFound")
        elif (revision := self.hub.find(repo, words[1])) is None:
            self._fail(404, "RevisionNotFound")
        elif api and words[0] == "tree":
            self._json([_tree_entry(name, data) for name, data in revision.files.items()])
        elif api:
            siblings = [_sibling(name, data, revision.sizes) for name, data in revision.files.items()]
            self._json({"id": repo, "modelId": repo, "sha": revision.commit, "siblings": siblings})
        elif repo in self.hub.gated:
            self._fail(403, "GatedRepo")
        else:
            self._file(revision, "/".join(words[2:]))

    def _file(self, revision: Revision, name: str) -> None:
        if name not in revision.files:
            self._fail(404, "EntryNotFound")
            return
        data = revision.files[name]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{_etag(data)}"')
        self.send_header("X-Repo-Commit", revision.commit)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            broken = name in self.hub.broken
            self.wfile.write(data[start : len(data) // 2] if broken else data[start:])
            self.close_connection = broken

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(data: bytes) -> str:
    """What LFS calls a large file and git a small one; also its name in the cache."""
    return hashlib.sha256(data).hexdigest() if len(data) >= LARGE else _git_hash(data)


def _git_hash(data: bytes) -> str:
    """Of what git holds: of a large file, a pointer."""
    kept = b"oid sha256:%s" % _etag(data).encode() if len(data) >= LARGE else data
    return hashlib.sha1(b"blob %d\0" % len(kept) + kept).hexdigest()


def _sibling(name: str, data: bytes, sizes: dict[str, int]) -> dict[str, object]:
    entry: dict[str, object] = {"rfilename": name, "size": sizes.get(name, len(data)), "blobId": _git_hash(data)}
    if len(data) >= LARGE:
        entry["lfs"] = {"sha256": _etag(data), "size": len(data), "pointerSize": 134}
    return entry


def _tree_entry(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": _git_hash(data)}
    if len(data) >= LARGE:
        entry["lfs"] = {"oid": _etag(data), "size": len(data), "pointerSize": 134}
    return entry


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub at ``endpoint`` until the block ends."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    handler.hub = hub
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
