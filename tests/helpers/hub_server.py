"""A small Hub on loopback for the real client: repositories, preupload, LFS, commits, downloads, and faults."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "x" * 34
LFS_SUFFIXES = (".safetensors", ".bin", ".onnx")


@dataclass
class Repo:
    """One repository: its newest files and every commit."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)  # summary, and path -> bytes received
    versions: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> all its files

    @property
    def sha(self) -> str:
        """Name of the newest commit, 40 hex digits."""
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


@dataclass
class Fault:
    """A fault of the next `times` requests whose "METHOD /path" contains `part`."""

    part: str
    status: int = 500
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = "status"  # or cut: the connection ends in the middle; or hang: no answer until the Hub is stopped


@dataclass
class Hub:
    """The server's repositories and received requests. `refuse` maps part of a path to a response status."""

    repos: dict[str, Repo] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # LFS: sha256 -> bytes
    requests: list[tuple[str, str]] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)  # payloads of repos/create
    cards: list[str] = field(default_factory=list)  # READMEs sent to the validation
    refuse: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    received: dict[str, int] = field(default_factory=dict)  # LFS: sha256 -> number of complete uploads
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""


@contextmanager
def running_hub(token: str = TOKEN) -> Iterator[Hub]:
    """Run a Hub on a free port; only `token` may write."""
    hub = Hub()

    class BoundHandler(Handler):
        pass

    BoundHandler.hub, BoundHandler.token = hub, token
    server = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """The part of the Hub's API that the client uses."""

    hub: Hub
    token: str
    protocol_version = "HTTP/1.1"
    routes = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/main", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/main", "commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/storage/([0-9a-f]{64})", "store"),
        ("POST", r"/verify", "verify"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def answer(self) -> None:
        """Route a request and respond."""
        path = self.path.split("?")[0]
        fault = self.next_fault(f"{self.command} {path}")
        if fault is not None and fault.kind == "cut":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path))
        if fault is not None and fault.kind == "hang":
            self.hub.stopped.wait(60)
            self.close_connection = True
            return
        if fault is not None:
            self.send_json({"error": "a fault of the test"}, fault.status, **fault.headers)
            return
        refused = next((status for part, status in self.hub.refuse.items() if part in path), None)
        if refused is not None:
            self.send_json({"error": "refused by the test"}, refused)
            return
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, name in self.routes:
            if verb == method and (match := re.fullmatch(pattern, path)):
                hidden = verb == "GET" and (repo := self.hub.repos.get(match[1])) is not None and repo.private
                asks = hidden or (verb == "POST" and name not in ("validate", "verify"))
                if asks and not self.known_token():
                    self.send_json({"error": "Invalid username or password."}, 401)
                else:
                    getattr(self, name)(*match.groups())
                return
        self.send_json({"error": "not found"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = answer

    def known_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.token}"

    def next_fault(self, request: str) -> Fault | None:
        """Return the fault for a request, if any, and count it."""
        with self.hub.lock:
            fault = next((fault for fault in self.hub.faults if fault.times > 0 and fault.part in request), None)
            if fault is not None:
                fault.times -= 1
        return fault

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def send_bytes(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, values: Any, status: int = 200, **headers: str) -> None:
        self.send_bytes(json.dumps(values).encode(), status, Content_Type="application/json", **headers)

    def create(self) -> None:
        request = json.loads(self.body)
        self.hub.created.append(request)
        name = f"{request['organization']}/{request['name']}"
        exists = name in self.hub.repos
        if not exists:
            self.hub.repos[name] = Repo(
                private=request.get("visibility") == "private" or request.get("private") is True
            )
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        self.send_json(
            {**answer, "error": "You already created this model repo"} if exists else answer, 200 + 209 * exists
        )

    def validate(self) -> None:
        card = json.loads(self.body)["content"]
        self.hub.cards.append(card)
        wrong = "license: nobody-knows" in card
        errors = [{"message": '"license" must be one of [apache-2.0, ...]'}] if wrong else []
        self.send_json({"errors": errors, "warnings": []}, 400 if wrong else 200)

    def info(self, name: str, revision: str | None) -> None:
        repo = self.hub.repos.get(name)
        if repo is None or (revision not in (None, "main") and revision not in repo.versions):
            missing = "RepoNotFound" if repo is None else "RevisionNotFound"
            self.send_json({"error": f"{missing}: {name}"}, 404, X_Error_Code=missing)
            return
        newest = revision in (None, "main")
        siblings = [{"rfilename": path} for path in (repo.files if newest else repo.versions[str(revision)])]
        sha = repo.sha if newest else revision
        self.send_json({"id": name, "modelId": name, "private": repo.private, "sha": sha, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        repo = self.hub.repos[name]
        files = repo.versions.get(revision, repo.files)
        names = {path: hashlib.sha1(content).hexdigest() for path, content in files.items()}
        self.send_json([{"type": "file", "path": p, "size": len(files[p]), "oid": oid} for p, oid in names.items()])

    def preupload(self, name: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.send_json({"files": files})

    def lfs_batch(self, name: str) -> None:
        objects = []
        for item in json.loads(self.body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.stored:
                upload = {"href": f"{self.hub.url}/storage/{item['oid']}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify"}}
            objects.append(answer)
        self.send_json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.send_json({"error": "the content is not what its name says"}, 400)
            return
        self.hub.stored[oid] = self.body
        self.hub.received[oid] = self.hub.received.get(oid, 0) + 1
        self.send_bytes(b"")

    def verify(self) -> None:
        request = json.loads(self.body)
        content = self.hub.stored.get(request["oid"])
        is_complete = content is not None and len(content) == request["size"]
        self.send_json({}, 200 if is_complete else 404)

    def commit(self, name: str) -> None:
        repo, files, deleted, summary = self.hub.repos[name], {}, set(), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                summary = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif item["key"] == "deletedFile":
                deleted.add(value["path"])
            else:
                self.send_json({"error": f"unknown operation {item['key']}"}, 400)
                return
        repo.files = {path: content for path, content in {**repo.files, **files}.items() if path not in deleted}
        repo.commits.append({"summary": summary, "files": files})
        repo.versions[repo.sha] = dict(repo.files)
        url = f"{self.hub.url}/{name}/commit/{repo.sha}"
        self.send_json({"success": True, "commitOid": repo.sha, "commitUrl": url, "hookOutput": ""})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.hub.repos.get(name)
        files = None if repo is None else repo.files if revision == "main" else repo.versions.get(revision)
        if repo is None or files is None or path not in files:
            missing = "RepoNotFound" if repo is None else "RevisionNotFound" if files is None else "EntryNotFound"
            self.send_bytes(b"", 404, X_Error_Code=missing)
            return
        sha, content = repo.sha if revision == "main" else revision, files[path]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.send_bytes(content, ETag=etag, X_Repo_Commit=sha, Content_Type="application/octet-stream")
