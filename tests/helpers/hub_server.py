"""A hub in memory that speaks the endpoints huggingface_hub uses for model repositories (all but xet).

Commits, Git LFS uploads and downloads go as on the real hub: a commit may only
name LFS objects that were uploaded before and whose sha256 was verified, and
LFS files are downloaded through a redirect to another origin.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin")
REPO = r"(?P<repo>[^/]+/[^/]+)"


@dataclass(frozen=True)
class File:
    content: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, File]:
        return self.commits[self.head]

    def commit(self, files: Mapping[str, File], message: str) -> str:
        content = [message, len(self.commits), sorted((path, file.sha256) for path, file in files.items())]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.messages.append(message)
        return sha


class Refused(Exception):
    """What the hub answers instead of a success."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class HubServer:
    """`url` is the endpoint, `token` the one that may write and read what is private."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self._start(0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def store(self) -> str:
        """Where LFS objects lie: the same server, but another origin to a client."""
        return f"http://localhost:{self.port}"

    def put(self, repo: str, files: Mapping[str, bytes]) -> str:
        """Add or change files as somebody else's commit."""
        if repo not in self.repos:
            self.repos[repo] = Repo()
            self.repos[repo].commit({}, "initial commit")
        changed = {path: File(content) for path, content in files.items()}
        return self.repos[repo].commit(self.repos[repo].files | changed, "put")

    def paths(self, repo: str) -> list[str]:
        return sorted(self.repos[repo].files)

    @contextmanager
    def down(self) -> Iterator[None]:
        """Connections are refused while this is open."""
        self.stop()
        try:
            yield
        finally:
            self._start(self.port)

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _start(self, port: int) -> None:
        self._http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    # HTTP/1.0, the default: no connection outlives HubServer.down()
    hub: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            for method, pattern, action in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match is not None and self.command in method.split():
                    action(self, **match.groupdict())
                    return
            raise Refused(404, f"no such endpoint: {self.command} {path}")
        except Refused as refused:
            headers = {"X-Error-Message": str(refused)}
            if refused.code is not None:
                headers["X-Error-Code"] = refused.code
            self._send(json.dumps({"error": str(refused)}).encode(), refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _send(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    @property
    def _knows_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _may_write(self) -> None:
        if not self._knows_token:
            raise Refused(401, "Invalid credentials in Authorization header")

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._knows_token):
            raise Refused(404 if self._knows_token else 401, "Repository not found", "RepoNotFound")
        return repo

    def _commit_of(self, name: str, revision: str) -> str:
        repo = self._repo(name)
        sha = repo.head if revision == "main" else revision
        if sha not in repo.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def create(self) -> None:
        self._may_write()
        wanted = json.loads(self.body)
        name = f"{wanted['organization'] or 'tester'}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repos:
            self._send_json({"error": "You already created this model repo", **url}, 409)
            return
        private = wanted.get("private", False) or wanted.get("visibility") == "private"
        self.hub.repos[name] = Repo(private)
        self.hub.repos[name].commit({".gitattributes": File(b"*.safetensors filter=lfs\n")}, "initial commit")
        self._send_json(url)

    def info(self, repo: str, revision: str | None) -> None:
        sha = self._commit_of(repo, revision or "main")
        siblings = [{"rfilename": path} for path in self.hub.repos[repo].commits[sha]]
        private = self.hub.repos[repo].private
        self._send_json({"id": repo, "modelId": repo, "sha": sha, "private": private, "siblings": siblings})

    def tree(self, repo: str, revision: str) -> None:
        files = self._repo(repo).commits[self._commit_of(repo, revision)]
        entries = []
        for path, file in files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.git_oid}
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
            entries.append(entry)
        self._send_json(entries)

    def preupload(self, repo: str, revision: str) -> None:
        self._may_write()
        present = self._repo(repo).commits[self._commit_of(repo, revision)]
        answer = []
        for wanted in json.loads(self.body)["files"]:
            path = wanted["path"]
            lfs = path.endswith(LFS_SUFFIXES)
            old = present.get(path)
            oid = None if old is None else old.sha256 if lfs else old.git_oid
            mode = "lfs" if lfs else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send_json({"files": answer})

    def lfs_batch(self, repo: str) -> None:
        self._may_write()
        self._repo(repo)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.store}/objects/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.url}/verify"},
                }
            objects.append(answer)
        self._send_json({"transfer": "basic", "objects": objects})

    def put_object(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "the object is not what its sha256 says")
        self.hub.objects[oid] = self.body
        self._send(b"")

    def verify(self) -> None:
        self._may_write()
        wanted = json.loads(self.body)
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refused(404, "no such object, or of another size")
        self._send_json({})

    def commit(self, repo: str, revision: str) -> None:
        self._may_write()
        head = self._commit_of(repo, revision)
        files = dict(self._repo(repo).commits[head])
        header: dict[str, Any] = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                header = value
            elif item["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = File(self.hub.objects[value["oid"]])
            elif item["key"] == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise Refused(400, f"cannot do {item}")
        if header.get("parentCommit", head) != head:
            raise Refused(412, "the branch has moved on")
        sha = self._repo(repo).commit(files, header["summary"])
        self._send_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        sha = self._commit_of(repo, revision)
        file = self._repo(repo).commits[sha].get(path)
        if file is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.git_oid}"', "Accept-Ranges": "bytes"}
        if not path.endswith(LFS_SUFFIXES):
            self._send(file.content, headers=headers)
            return
        self.hub.objects.setdefault(file.sha256, file.content)
        headers["X-Linked-ETag"] = f'"{file.sha256}"'
        headers["X-Linked-Size"] = str(len(file.content))
        headers["Location"] = f"{self.hub.store}/objects/{file.sha256}"
        self._send(b"", 302, headers)

    def get_object(self, oid: str) -> None:
        self._send(self.hub.objects[oid], headers={"ETag": f'"{oid}"'})


_ROUTES = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("GET", rf"/api/models/{REPO}(?:/revision/(?P<revision>.+))?", _Handler.info),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/objects/(?P<oid>[0-9a-f]{64})", _Handler.put_object),
    ("GET", r"/objects/(?P<oid>[0-9a-f]{64})", _Handler.get_object),
    ("POST", r"/verify", _Handler.verify),
    ("GET HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
