"""A small Hub on the loopback interface, for tests that run the real client against it.

    with HubServer() as hub:
        commit = hub.add("user/model", {"config.json": b"{}", "model.safetensors": data})
        hub.misbehave("corrupt", "model.safetensors", times=1)
        done = run_client(hub, "print(1)", home)
        assert hub.count("GET", "model.safetensors") == 2

It speaks what huggingface_hub asks of a Hub without Xet: resolving (HEAD, GET, ranges, a redirect of large files to
another origin), model, tree and branch requests, and pushing (create, preupload, LFS batch and upload, commit), with
the Hub's headers and error codes. Large are the files that end as weights do (`LARGE`).
"""

import base64
import fnmatch
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".npz")
TOKENS = {"reading": "read", "writing": "write"}  # a token and what it may do, for every repository


class Request(NamedTuple):
    """One request as it came in: `file` is the repository's file that it is about, or ""."""

    method: str
    path: str
    file: str
    headers: Mapping[str, str]


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, changes: Mapping[str, bytes | None]) -> str:
        """Writes (or, for None, removes) files on a branch and answers the new commit."""
        files = dict(self.commits.get(self.branches.get(branch, ""), {}))
        files.update({name: data for name, data in changes.items() if data is not None})
        for name in [name for name, data in changes.items() if data is None]:
            del files[name]
        commit = hashlib.sha1(f"{branch} {len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


@dataclass
class Misbehaviour:
    how: str | int
    pattern: str
    method: str
    times: float
    seconds: float


class HubServer:
    """The server, running between ``with`` and its end. `url` is what a client takes as ``HF_ENDPOINT``."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.misbehaviours: list[Misbehaviour] = []
        self.lock = threading.RLock()
        # Large files come from a second host, as from a real Hub: no token may go there.
        self._servers = [_Server(self), _Server(self)]
        self.url, self.cdn = (
            f"http://{host}:{server.server_port}"
            for host, server in zip(("127.0.0.1", "localhost"), self._servers, strict=True)
        )

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(
        self,
        repo_id: str,
        files: Mapping[str, bytes | None],
        revision: str = "main",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Commits files to a branch (None removes one), making what is missing; answers the commit."""
        with self.lock:
            repo = self.repos.setdefault(repo_id, Repo(private, gated))
            return repo.commit(revision, files)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """A repository's files at a branch."""
        repo = self.repos[repo_id]
        return repo.commits[repo.branches[revision]]

    def misbehave(
        self, how: str | int, file: str = "*", method: str = "GET", times: float = float("inf"), seconds: float = 60
    ) -> None:
        """Spoils the next `times` answers about `file` (a pattern, also of paths) to requests of `method`.

        how: a status such as 503; ``"reset"`` (the connection, without an answer); ``"slow"`` (an answer after
            `seconds`); and of a body, ``"corrupt"`` (one bit differs), ``"truncate"`` (half of it, then the end: the
            client sees that) or ``"short"`` (half of it, announced as the whole).
        """
        with self.lock:
            self.misbehaviours.append(Misbehaviour(how, file, method, times, seconds))

    def behave(self) -> None:
        """Ends all misbehaviour and forgets the requests so far."""
        with self.lock:
            self.misbehaviours.clear()
            self.requests.clear()

    def count(self, method: str, file: str = "*") -> int:
        """How many requests of a method came in about a file (a pattern, also of paths)."""
        with self.lock:
            return sum(one.method == method and _about(file, one.file, one.path) for one in self.requests)


def _about(pattern: str, file: str, path: str) -> bool:
    return fnmatch.fnmatchcase(file, pattern) or fnmatch.fnmatchcase(path, pattern)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 32

    def __init__(self, hub: HubServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, or is hung up on, is part of the tests; anything else is an error in this file."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Refusal(Exception):  # noqa: N818 - an answer, not an error
    def __init__(self, status: int, code: str = "", message: str = "", commit: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        """Nothing: `HubServer.requests` is the log."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    # One request

    def _answer(self) -> None:
        self.hub = self.server.hub
        self.body = self._read_body()
        path = urlsplit(self.path).path
        resolve = re.fullmatch(r"/(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path)
        content = re.fullmatch(r"/content/(?P<sha256>\w{64})/(?P<file>.+)", path)
        found = content or resolve
        self.file = unquote(found["file"]) if found else ""
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, path, self.file, dict(self.headers.items())))
            try:
                how = "" if resolve and self._redirects(resolve) else self._misbehaves(path)
                if how == "reset":
                    return self._reset()
                if how.isdigit():
                    raise _Refusal(int(how), message="misbehaving")
                if resolve:
                    self._send_file(*self._resolve(resolve), how)
                elif content:
                    self._send_file(self.hub.uploads[content["sha256"]], {}, how)
                else:
                    self._api(path)
            except _Refusal as refusal:
                self._send(refusal.status, b'{"error": "refused"}', refusal.headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _misbehaves(self, path: str) -> str:
        """What is to go wrong with this answer, or ""."""
        for one in self.hub.misbehaviours:
            if one.times > 0 and one.method == self.command and _about(one.pattern, self.file, path):
                one.times -= 1
                if one.how != "slow":
                    return str(one.how)
                self.hub.lock.release()  # others are served while this one waits
                try:
                    time.sleep(one.seconds)
                finally:
                    self.hub.lock.acquire()
        return ""

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], announced: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            if value:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if announced is None else announced))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.wfile.flush()
        if announced is not None and self.command != "HEAD":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def _send_json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    # Files

    def _redirects(self, match: re.Match[str]) -> bool:
        """Whether this is the request that only leads to a large file, the content being elsewhere."""
        return self.command == "GET" and match["file"].endswith(LARGE)

    def _resolve(self, match: re.Match[str]) -> tuple[bytes, dict[str, str]]:
        repo_id = unquote(match["repo"])
        repo = self._repo(repo_id, content=True)
        commit = self._commit(repo, unquote(match["revision"]))
        files = repo.commits[commit]
        if self.file not in files:
            raise _Refusal(404, "EntryNotFound", "Entry not found", commit)
        data = files[self.file]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not self.file.endswith(LARGE):
            return data, {**headers, "ETag": f'"{_git_hash(data)}"'}
        sha256 = hashlib.sha256(data).hexdigest()
        self.hub.uploads[sha256] = data
        location = f"{self.hub.cdn}/content/{sha256}/{match['file']}"
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256}"', "Location": location}
        return b"", {**headers, **linked, "ETag": f'"{_git_hash(_pointer(data))}"'}

    def _send_file(self, data: bytes, headers: dict[str, str], how: str) -> None:
        if "Location" in headers:
            return self._send(302, b"", headers)
        status, start = 200, 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, start = 206, int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        half = len(data) // 2
        if how == "corrupt":
            data = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
        if how == "truncate":
            return self._send(status, data[start:half], headers, announced=len(data) - start)
        self._send(status, data[start:half] if how == "short" else data[start:], headers)

    # Repositories

    def _may(self, what: str) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return TOKENS.get(token, "") in {"read": ("read", "write"), "write": ("write",)}[what]

    def _repo(self, repo_id: str, content: bool = False) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self._may("read")):
            raise _Refusal(404 if self._may("read") else 401, "RepoNotFound", "Repository not found")
        if content and repo.gated and not self._may("read"):
            raise _Refusal(403, "GatedRepo", f"Access to model {repo_id} is restricted")
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _api(self, path: str) -> None:
        if batch := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self._lfs_batch(batch[1])
        if upload := re.fullmatch(r"/upload/(\w{64})", path):
            self.hub.uploads[upload[1]] = self.body
            return self._send(200, b"", {})
        if path == "/api/repos/create":
            return self._create()
        if path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        if path == "/api/whoami-v2":
            if not self._may("read"):
                raise _Refusal(401, message="Invalid username or password.")
            return self._send_json({"type": "user", "name": "user", "orgs": []})
        model = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+))?(?:/([^/]+))?(?:/.*)?", path)
        if model is None:
            raise _Refusal(404, message=f"no such address: {path}")
        repo_id, what, revision = model[1], model[2] or "revision", unquote(model[3] or "main")
        if what == "revision":
            return self._send_json(self._model(repo_id, revision))
        if what == "tree":
            return self._send_json(self._tree(repo_id, revision))
        if what == "refs":
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                for name, commit in self._repo(repo_id).branches.items()
            ]
            return self._send_json({"branches": branches, "tags": [], "converts": []})
        repo = self._repo(repo_id)
        if not self._may("write"):
            raise _Refusal(403, message="You have no write access")
        if what == "branch":
            if revision in repo.branches:
                raise _Refusal(409, message="Branch exists")
            repo.branches[revision] = repo.branches["main"]
            return self._send(200, b"", {})
        self._commit(repo, revision)
        if what == "preupload":
            return self._preupload(repo, revision)
        if what == "commit":
            return self._receive_commit(repo_id, repo, revision)
        raise _Refusal(404, message=f"no such address: {path}")

    def _model(self, repo_id: str, revision: str) -> dict[str, object]:
        repo = self._repo(repo_id)
        commit = self._commit(repo, revision)
        siblings = [{"rfilename": name, "size": len(data)} for name, data in repo.commits[commit].items()]
        answer = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings}
        return {**answer, "private": repo.private, "gated": repo.gated, "disabled": False, "tags": [], "downloads": 0}

    def _tree(self, repo_id: str, revision: str) -> list[dict[str, object]]:
        repo = self._repo(repo_id)
        entries: list[dict[str, object]] = []
        for name, data in repo.commits[self._commit(repo, revision)].items():
            entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": _git_hash(data)}
            if name.endswith(LARGE):
                pointer, sha256 = _pointer(data), hashlib.sha256(data).hexdigest()
                entry["oid"] = _git_hash(pointer)
                entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": len(pointer)}
            entries.append(entry)
        return entries

    def _create(self) -> None:
        if not self._may("read"):
            raise _Refusal(401, message="Invalid username or password.")
        if not self._may("write"):
            raise _Refusal(403, message="You don't have the rights to create a model")
        asked = json.loads(self.body)
        repo_id = f"{asked['organization'] or 'user'}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repos:
            return self._send_json({**answer, "error": "You already created this model repo"}, 409)
        self.hub.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.repos[repo_id].private = asked.get("private") is True or asked.get("visibility") == "private"
        self._send_json(answer)

    def _preupload(self, repo: Repo, revision: str) -> None:
        files = repo.commits[repo.branches[revision]]
        answers = []
        for file in json.loads(self.body)["files"]:
            name = file["path"]
            mode = "lfs" if name.endswith(LARGE) else "regular"
            answer = {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None}
            if name in files:
                answer["oid"] = hashlib.sha256(files[name]).hexdigest() if mode == "lfs" else _git_hash(files[name])
            answers.append(answer)
        self._send_json({"files": answers})

    def _lfs_batch(self, repo_id: str) -> None:
        self._repo(repo_id)
        if not self._may("write"):
            raise _Refusal(403, message="You have no write access")
        objects = []
        for asked in json.loads(self.body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.uploads:
                entry["actions"] = {"upload": {"href": f"{self.hub.cdn}/upload/{asked['oid']}", "header": {}}}
            objects.append(entry)
        self._send_json({"transfer": "basic", "objects": objects})

    def _receive_commit(self, repo_id: str, repo: Repo, revision: str) -> None:
        changes: dict[str, bytes | None] = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                data = self.hub.uploads.get(value["oid"])
                if data is None or hashlib.sha256(data).hexdigest() != value["oid"]:
                    raise _Refusal(400, message=f"the content of {value['path']} was not uploaded as announced")
                changes[value["path"]] = data
            elif entry["key"] == "deletedFile":
                changes[value["path"]] = None
        commit = repo.commit(revision, changes)
        address = f"{self.hub.url}/{repo_id}/commit/{commit}"
        self._send_json({"success": True, "commitOid": commit, "commitUrl": address, "hookOutput": ""})


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _pointer(data: bytes) -> bytes:
    """What git keeps in the place of a large file."""
    sha256 = hashlib.sha256(data).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()


# Clients


def start_client(
    hub: HubServer, code: str, home: Path, env: Mapping[str, str] | None = None
) -> "subprocess.Popen[str]":
    """Starts Python on `code`, in a process whose Hub is `hub` and whose cache is under `home`."""
    inherited = {key: value for key, value in os.environ.items() if not key.upper().endswith("_PROXY")}
    inherited = {
        key: value for key, value in inherited.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
    }
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_ETAG_TIMEOUT": "15",
        "HF_HUB_DOWNLOAD_TIMEOUT": "15",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
    }
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**inherited, **own, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_client(
    hub: HubServer, code: str, home: Path, env: Mapping[str, str] | None = None, timeout: float = 120
) -> "subprocess.CompletedProcess[str]":
    """Runs Python on `code` as `start_client` does, to its end."""
    process = start_client(hub, code, home, env)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
