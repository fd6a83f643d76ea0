"""A hub on loopback for the unmodified huggingface_hub client, with failures on demand.

with HubServer() as hub:
    os.environ["HF_ENDPOINT"] = hub.url          # before huggingface_hub is imported
    hub.faults.append(Fault("GET", "model.safetensors", cut=1000))
"""

import base64
import json
import re
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.serialization.store import Entry, Repo, Store

__all__ = ["Fault", "HubServer"]


@dataclass
class Fault:
    """A failure of the next `times` requests of `method` whose path contains `path`."""

    method: str
    path: str
    times: int = 1
    status: int | None = None  # the status of the answer, sent with `headers`
    headers: tuple[tuple[str, str], ...] = ()
    cut: int | None = None  # close the connection after so many bytes of the body; 0 closes it without an answer
    delay_s: float = 0


class HubServer(ThreadingHTTPServer):
    """A hub at `url`; `log` has every request as (method, path, Range header, status)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.store, self.lock = Store(), threading.RLock()
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, str | None, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage_url(self) -> str:
        """The URL of large files. For a client it is another host, to which it must not send its token."""
        return f"http://localhost:{self.server_port}/storage"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news."""

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.path in path:
                    fault.times -= 1
                    return fault
        return None


class Refused(Exception):  # noqa: N818 -- an answer, not an error
    def __init__(self, status: int, code: str = "", message: str = "", **body: Any) -> None:
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}


class Handler(BaseHTTPRequestHandler):
    """One request: faults first, then the routes in their order."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are in `server.log`."""

    def answer(self) -> None:
        self.content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        self.route_path, self.query = parts.path, parse_qs(parts.query)
        self.cut: int | None = None
        fault = self.server.fault(self.command, self.path)
        if fault is not None:
            time.sleep(fault.delay_s)
            self.cut = fault.cut
            if fault.status is not None:
                return self.send(fault.status, b"{}", dict(fault.headers))
            if fault.cut == 0:
                return self.close_early()
        try:
            with self.server.lock:
                self.user = self.authenticated()
                for method, pattern, function in ROUTES:
                    if method == self.command and (match := re.fullmatch(pattern, self.route_path)):
                        status, body, headers = function(self, *map(unquote, match.groups()))
                        break
                else:
                    raise Refused(404, message=f"this hub has no {self.command} {self.route_path}")
        except Refused as refused:
            status, body, headers = refused.status, json.dumps(refused.body).encode(), refused.headers
        return self.send(status, body, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.server.log.append((self.command, self.path, self.headers.get("Range"), status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: self.cut])
        if self.cut is not None:
            self.close_early()

    def close_early(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)

    def authenticated(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None or self.route_path.startswith("/storage"):
            return None
        if (user := self.server.store.users.get(header.removeprefix("Bearer "))) is None:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return user

    def repo(self, name: str, *, write: bool = False) -> Repo:
        repo = self.server.store.repos.get(name)
        owner = name.partition("/")[0]
        if repo is None or (repo.private and self.user != owner):
            raise Refused(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if repo.gated and self.user != owner:
            raise Refused(403 if self.user else 401, "GatedRepo", f"Access to model {name} is restricted")
        if write and self.user != owner:
            raise Refused(403 if self.user else 401, message="You don't have the rights to write here")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> str:
        if (commit := repo.resolve(revision)) is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def json(self) -> Any:
        return json.loads(self.content)


Answer = tuple[int, bytes, dict[str, str]]


def ok(body: Any, status: int = 200) -> Answer:
    return status, json.dumps(body).encode(), {"Content-Type": "application/json"}


def whoami(request: Handler) -> Answer:
    if request.user is None:
        raise Refused(401, message="Invalid username or password.")
    return ok({"type": "user", "name": request.user, "orgs": [], "auth": {"type": "access_token"}})


def create_repo(request: Handler) -> Answer:
    given = request.json()
    if request.user is None:
        raise Refused(401, message="Invalid username or password.")
    owner = given.get("organization") or request.user
    name = f"{owner}/{given['name']}"
    if owner != request.user:
        raise Refused(403, message=f"You don't have the rights to create a model under the namespace {owner!r}")
    url = f"{request.server.url}/{name}"
    if name in request.server.store.repos:
        raise Refused(409, message="You already created this model repo", url=url)
    private = given.get("visibility") == "private" or given.get("private") is True
    request.server.store.repos[name] = Repo(name, private)
    return ok({"url": url, "name": name, "id": name})


def validate_yaml(request: Handler) -> Answer:
    match = re.match(r"---\n(.*?)\n---", request.json()["content"], re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else {}
        errors = [] if isinstance(metadata, dict) else [{"message": "metadata should be an object"}]
        errors += [{"message": '"base_model" must be a string'}] if metadata.get("base_model") == "" else []
    except yaml.YAMLError as error:
        errors = [{"message": str(error)}]
    return ok({"warnings": [], "errors": errors}, 400 if errors else 200)


def model_info(request: Handler, name: str, revision: str = "main") -> Answer:
    repo = request.repo(name)
    commit = request.commit_of(repo, revision)
    siblings = [{"rfilename": path} for path in repo.commits[commit]]
    return ok({"id": name, "modelId": name, "sha": commit, "private": repo.private, "tags": [], "siblings": siblings})


def tree(request: Handler, name: str, revision: str) -> Answer:
    repo = request.repo(name)
    return ok(
        [
            {"type": "file", "path": path, "oid": entry.oid, "size": len(entry.data)}
            | ({"lfs": {"oid": entry.sha256, "size": len(entry.data), "pointerSize": 130}} if entry.lfs else {})
            for path, entry in repo.commits[request.commit_of(repo, revision)].items()
        ]
    )


def create_branch(request: Handler, name: str, branch: str) -> Answer:
    repo = request.repo(name, write=True)
    if branch in repo.refs:
        raise Refused(409, message=f"Reference already exists: {branch}")
    repo.refs[branch] = request.commit_of(repo, request.json().get("startingPoint", "main"))
    return ok({})


def create_tag(request: Handler, name: str, revision: str) -> Answer:
    repo = request.repo(name, write=True)
    repo.refs[request.json()["tag"]] = request.commit_of(repo, revision)
    return ok({})


def preupload(request: Handler, name: str, revision: str) -> Answer:
    repo = request.repo(name, write="create_pr" not in request.query)
    present = repo.commits[request.commit_of(repo, revision)]
    return ok(
        {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": present[file["path"]].etag if file["path"] in present else None,
                }
                for file in request.json()["files"]
            ]
        }
    )


def lfs_batch(request: Handler, name: str) -> Answer:
    request.repo(name)
    objects = []
    for wanted in request.json()["objects"]:
        place = {"href": f"{request.server.storage_url}/{wanted['oid']}"}
        verify = {"href": f"{request.server.url}/{name}.git/info/lfs/verify"}
        there = wanted["oid"] in request.server.store.objects
        objects.append({**wanted} if there else {**wanted, "actions": {"upload": place, "verify": verify}})
    return ok({"transfer": "basic", "objects": objects})


def lfs_verify(request: Handler, name: str) -> Answer:
    data = request.server.store.objects.get(request.json()["oid"])
    if data is None or len(data) != request.json()["size"]:
        raise Refused(404, message="the object was not uploaded")
    return ok({})


def storage_put(request: Handler, oid: str) -> Answer:
    entry = Entry(request.content, True)
    if request.headers.get("Authorization") or entry.sha256 != oid:
        raise Refused(400, message="a token reached the storage, or the content is not what its name says")
    request.server.store.objects[oid] = request.content
    return ok({})


def storage_get(request: Handler, oid: str) -> Answer:
    if request.headers.get("Authorization"):
        raise Refused(400, message="a token reached the storage")
    data = request.server.store.objects[oid]
    return content(request, data, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def content(request: Handler, data: bytes, headers: dict[str, str]) -> Answer:
    if match := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or ""):
        start = int(match[1])
        return 206, data[start:], {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
    return 200, data, headers


def commit(request: Handler, name: str, revision: str) -> Answer:
    pull_request = "create_pr" in request.query
    repo = request.repo(name, write=not pull_request)
    lines = [json.loads(line) for line in request.content.splitlines()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    if header.get("parentCommit") not in (None, request.commit_of(repo, revision)):
        raise Refused(412, message="A commit has happened since. Please refresh and try again.")
    changes = {}
    for value in (line["value"] for line in lines if line["key"] == "file"):
        changes[value["path"]] = Entry(base64.b64decode(value["content"]), False)
    for value in (line["value"] for line in lines if line["key"] == "lfsFile"):
        if value["oid"] not in request.server.store.objects:
            raise Refused(400, message=f"LFS object {value['oid']} was not uploaded")
        changes[value["path"]] = Entry(request.server.store.objects[value["oid"]], True)
    repo.pull_requests += pull_request
    ref = f"refs/pr/{repo.pull_requests}" if pull_request else revision
    oid = repo.commit(ref, changes, header["summary"], onto=revision)
    answer = {"success": True, "commitOid": oid, "commitUrl": f"{request.server.url}/{name}/commit/{oid}"}
    if pull_request:
        answer["pullRequestUrl"] = f"{request.server.url}/{name}/discussions/{repo.pull_requests}"
    return ok(answer)


def resolve(request: Handler, name: str, revision: str, path: str) -> Answer:
    repo = request.repo(name)
    oid = request.commit_of(repo, revision)
    entry = repo.commits[oid].get(path)
    if entry is None:
        refused = Refused(404, "EntryNotFound", "Entry not found")
        refused.headers["X-Repo-Commit"] = oid
        raise refused
    headers = {"X-Repo-Commit": oid, "ETag": f'"{entry.etag}"', "Accept-Ranges": "bytes"}
    if not entry.lfs:
        return content(request, entry.data, headers)
    linked = {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(len(entry.data))}
    return 302, b"", {**headers, **linked, "Location": f"{request.server.storage_url}/{entry.sha256}"}


REPO, PART = r"([\w.-]+/[\w.-]+)", r"([^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create_repo),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("GET", f"/api/models/{REPO}", model_info),
    ("GET", f"/api/models/{REPO}/revision/{PART}", model_info),
    ("GET", f"/api/models/{REPO}/tree/{PART}", tree),
    ("POST", f"/api/models/{REPO}/branch/{PART}", create_branch),
    ("POST", f"/api/models/{REPO}/tag/{PART}", create_tag),
    ("POST", f"/api/models/{REPO}/preupload/{PART}", preupload),
    ("POST", f"/api/models/{REPO}/commit/{PART}", commit),
    ("POST", f"/{REPO}\\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", f"/{REPO}\\.git/info/lfs/verify", lfs_verify),
    ("PUT", "/storage/([0-9a-f]{64})", storage_put),
    ("GET", "/storage/([0-9a-f]{64})", storage_get),
    ("HEAD", f"/{REPO}/resolve/{PART}/(.+)", resolve),
    ("GET", f"/{REPO}/resolve/{PART}/(.+)", resolve),
]
