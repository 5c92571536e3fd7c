# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""A Hugging Face Hub on 127.0.0.1, in memory: enough of its HTTP protocol for the unmodified huggingface_hub client.

    with HubServer(users={"hf_alice": "alice"}) as hub:  # HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET=1
        ...
        [commit.title for commit in hub.repos["alice/name"].log("main")]

It checks metadata, LFS objects, permissions and parent commits as the Hub does. Unlike the Hub it records commits that
change nothing, so that tests see a client that makes one.
"""

import base64
import contextlib
import hashlib
import json
import re
import secrets
import socket
import struct
import threading
import traceback
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


# The Hub's own list, from its error message (huggingface_hub issue 4218)
LICENSES = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
other""".split()
NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.png filter=lfs diff=lfs merge=lfs -text\n"


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **body):
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()
        )

    @property
    def git_oid(self) -> str:
        blob = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    def entry(self, path: str) -> dict:
        lfs = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        entry = {"type": "file", "path": path, "size": len(self.data), "oid": self.git_oid}
        return entry | ({"lfs": lfs} if self.lfs else {})


@dataclass
class Commit:
    title: str
    description: str
    author: str
    parent: str | None
    files: dict[str, File]
    sha: str = field(default_factory=lambda: secrets.token_hex(20))
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))


@dataclass
class Repo:
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)  # by sha
    refs: dict[str, str] = field(default_factory=dict)  # "main", other branches and "refs/pr/N" -> sha
    lfs: dict[str, bytes] = field(default_factory=dict)  # by sha256; invisible until a commit names them

    def resolve(self, revision: str) -> Commit:
        sha = self.refs.get(revision.removeprefix("refs/heads/"), revision)
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def log(self, revision: str = "main") -> list[Commit]:
        """Commits from the first, the Hub's "initial commit" with .gitattributes, to the newest."""
        commit = self.resolve(revision)
        return (self.log(commit.parent) if commit.parent else []) + [commit]

    def add(self, ref: str, commit: Commit) -> Commit:
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    status: int | None = None  # None: the connection was cut

    @property
    def writes(self) -> bool:
        """Whether it asks the Hub to change something."""
        asks = re.search(r"/preupload/|/paths-info/|/api/validate-yaml", self.path)
        return self.method not in ("GET", "HEAD") and not asks


@dataclass
class Fault:
    """What happens to a request: an HTTP status, "cut" (the connection) or "die" (the server, until `start()`)."""

    method: str
    pattern: str
    action: int | str
    after: bool = False  # the request takes effect, and its answer is lost
    times: float = float("inf")


def card_metadata(content: str) -> tuple[dict | None, list[str]]:
    """The YAML front matter of a README.md, and its errors."""
    block = re.match(r"\s*---[\r\n]+([\S\s]*?)[\r\n]+---(\r\n|\n|$)", content)
    if block is None:
        return None, []
    try:
        nodes = yaml.compose(block[1])
        keys = [key.value for key, _ in nodes.value] if isinstance(nodes, yaml.MappingNode) else []
        if doubled := {key for key in keys if keys.count(key) > 1}:  # PyYAML would silently take the last one
            return None, [f"YAML: duplicated mapping key: {', '.join(doubled)}"]
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return None, [f"YAML: {error}"]
    return (data, []) if isinstance(data, dict) else (None, ["YAML metadata must be an object"])


def card_errors(content: str) -> list[str]:
    data, errors = card_metadata(content)
    if data is None:
        return errors

    def values(key):
        value = data.get(key)
        return value if isinstance(value, list) else [] if value is None else [value]

    errors = [
        f'"license" must be one of [{", ".join(LICENSES)}, array]' for v in values("license") if v not in LICENSES
    ]
    for key, kind in (("base_model", "model"), ("datasets", "dataset")):
        for value in values(key):
            if not re.fullmatch(rf"({NAME}/)?{NAME}", str(value)) or re.search(r"--|\.\.", str(value)):
                message = f'"{key}" with value "{value}" is not valid. Use a {kind} id from https://hf.co/{kind}s.'
                errors.append(message)
    for value in values("language"):
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual", str(value)):
            errors.append(f'"language" with value "{value}" is not valid. It must be an ISO 639 code.')
    for key, kind in (("tags", list), ("metrics", list), ("pipeline_tag", str), ("library_name", str)):
        if key in data and not isinstance(data[key], kind):
            errors.append(f'"{key}" must be {"an array" if kind is list else "a string"}')
    errors += [f'"tags[{i}]" must be a string' for i, tag in enumerate(values("tags")) if not isinstance(tag, str)]
    return errors + model_index_errors(data.get("model-index", []))


def model_index_errors(models) -> list[str]:
    if not isinstance(models, list):
        return ['"model-index" must be an array']
    errors = []

    def need(value, where, *names):
        for name in names:
            if not isinstance(value, dict) or value.get(name) in (None, "", {}):
                errors.append(f'"{where}.{name}" is required')
        return [value.get(name) if isinstance(value, dict) else None for name in names]

    for i, model in enumerate(models):
        _, results = need(model, f"model-index[{i}]", "name", "results")
        for j, result in enumerate(results if isinstance(results, list) else []):
            where = f"model-index[{i}].results[{j}]"
            task, dataset, metrics = need(result, where, "task", "dataset", "metrics")
            need(task, f"{where}.task", "type")
            need(dataset, f"{where}.dataset", "type", "name")
            for k, metric in enumerate(metrics if isinstance(metrics, list) else []):
                need(metric, f"{where}.metrics[{k}]", "type", "value")
    return errors


ROUTES = []
REPO = rf"(?P<repo>{NAME}/{NAME})"


def route(method: str, pattern: str):
    def register(function):
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class HubServer:
    def __init__(
        self,
        users: dict[str, str],
        read_only: dict[str, str] | None = None,
        lfs_size: int = 10_000_000,
        multipart_size: int = 1_000_000_000,
    ):
        self.users = {**users, **(read_only or {})}  # token -> user
        self.read_only = set(read_only or {})
        self.lfs_size, self.multipart_size = lfs_size, multipart_size
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.errors: list[str] = []  # tracebacks of this server's own bugs
        self._uploads: dict[str, tuple[Repo, str, int]] = {}  # by the signature in a URL: repo, sha256, size
        self._parts: dict[str, dict[int, bytes]] = {}
        self._lock = threading.RLock()
        self._address = ("127.0.0.1", 0)

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def start(self) -> "HubServer":
        self._server = _Server(self._address, _Handler)
        self._server.hub = self
        self._address = self._server.server_address  # a restart is on the same port
        self.url = f"http://127.0.0.1:{self._address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self):
        with contextlib.suppress(OSError):  # it is stopped already
            self._server.socket.shutdown(socket.SHUT_RDWR)  # first of all: nobody is let in any more
        for connection in list(self._server.connections):
            cut(connection)
        self._server.shutdown()
        self._server.server_close()

    def fail(self, method: str, pattern: str, action: int | str, after: bool = False, times: float = float("inf")):
        """Makes requests go wrong (see `Fault`); `hub.faults.clear()` makes them right again."""
        self.faults.append(Fault(method, pattern, action, after, times))

    def fault_of(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.method == method and fault.times > 0 and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault

    def answer(self, request: "_Handler", body: bytes) -> tuple[int, dict | list | bytes, dict[str, str]]:
        url = urlsplit(request.path)
        method = "GET" if request.command == "HEAD" else request.command
        for route_method, pattern, function in ROUTES:
            if route_method == method and (match := pattern.fullmatch(url.path)):
                groups = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                request.query, request.body = parse_qs(url.query), body
                try:
                    with self._lock:
                        result = function(self, request, **groups)
                except HubError as error:
                    return error.status, error.body, error.headers
                return result if isinstance(result, tuple) else (200, result, {})
        return 404, {"error": f"No such endpoint: {request.command} {url.path}"}, {}

    # who may do what

    def user(self, request: "_Handler") -> str | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.users.get(token)

    def writer(self, request: "_Handler", namespace: str, action: str) -> str:
        user = self.user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if request.headers["Authorization"].removeprefix("Bearer ") in self.read_only:
            raise HubError(403, "Forbidden: this token has the role read and cannot write")
        if user != namespace:
            raise HubError(403, f'You don\'t have the rights to {action} under the namespace "{namespace}"')
        return user

    def readable(self, request: "_Handler", repo_id: str) -> Repo:
        """A private repository looks like one that does not exist, to those who may not see it."""
        user, repo = self.user(request), self.repos.get(repo_id)
        if repo is None or repo.private and user != repo_id.split("/")[0]:
            if user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, request: "_Handler", repo_id: str) -> tuple[Repo, str]:
        repo = self.readable(request, repo_id)
        return repo, self.writer(request, repo_id.split("/")[0], "write to a model")

    # the account, repositories, metadata

    @route("GET", "/api/whoami-v2")
    def whoami(self, request):
        user = self.user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        role = "read" if request.headers["Authorization"].removeprefix("Bearer ") in self.read_only else "write"
        access = {"displayName": "token", "role": role}
        return {
            "type": "user",
            "id": user,
            "name": user,
            "fullname": user,
            "orgs": [],
            "auth": {"accessToken": access},
        }

    @route("POST", "/api/repos/create")
    def create_repo(self, request):
        asked = json.loads(request.body)
        user = self.user(request)
        namespace = asked.get("organization") or user
        user = self.writer(request, namespace, "create a model")
        repo_id = f"{namespace}/{asked['name']}"
        if not re.fullmatch(f"{NAME}/{NAME}", repo_id) or re.search(r"--|\.\.|\.git$", repo_id):
            raise HubError(400, f"Invalid repository name: {repo_id}")
        if repo_id in self.repos:
            raise HubError(409, "You already created this model repo", url=f"{self.url}/{repo_id}")
        private = asked.get("visibility") == "private" or asked.get("private", False)
        repo = self.repos[repo_id] = Repo(repo_id, private)
        repo.add("main", Commit("initial commit", "", user, None, {".gitattributes": File(GITATTRIBUTES, lfs=False)}))
        return {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": secrets.token_hex(12)}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request):
        content = json.loads(request.body)["content"]
        missing = {"message": "empty or missing yaml metadata in repo card"}
        errors = [{"message": message} for message in card_errors(content)]
        return (
            400 if errors else 200,
            {"errors": errors, "warnings": [] if card_metadata(content)[0] else [missing]},
            {},
        )

    @route("POST", f"/api/models/{REPO}/branch/(?P<branch>[^/]+)")
    def create_branch(self, request, repo, branch):
        repo, _ = self.writable(request, repo)
        if branch in repo.refs:
            raise HubError(409, f"Reference already exists: {branch}")
        if branch.startswith("refs/") or not re.fullmatch(r"[\w./-]+", branch):
            raise HubError(400, f"Invalid branch name: {branch}")
        repo.refs[branch] = repo.resolve(json.loads(request.body or b"{}").get("startingPoint", "main")).sha
        return 201, {}, {}

    # uploading

    @route("POST", f"/api/models/{REPO}/preupload/(?P<rev>[^/]+)")
    def preupload(self, request, repo, rev):
        files = self.readable(request, repo).resolve(rev).files
        if "create_pr" not in request.query:
            self.writable(request, repo)
        answers = []
        for asked in json.loads(request.body)["files"]:
            path, old = asked["path"], files.get(asked["path"])
            binary = b"\0" in base64.b64decode(asked["sample"])
            lfs = path.endswith((".safetensors", ".png")) or binary or asked["size"] >= self.lfs_size
            answers.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
            if old is not None:
                answers[-1]["oid"] = old.sha256 if old.lfs else old.git_oid
        return {"files": answers, "commitOid": self.repos[repo].resolve(rev).sha}

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, request, repo):
        repo, asked = self.readable(request, repo), json.loads(request.body)
        if "ref" in asked:
            self.writable(request, repo.id)  # only for a pull request does the client leave the ref out
        objects = []
        for thing in asked["objects"]:
            oid, size = thing["oid"], thing["size"]
            objects.append({"oid": oid, "size": size})
            if oid not in repo.lfs:
                signature = secrets.token_hex(8)
                self._uploads[signature] = repo, oid, size
                upload = {"href": f"{self.url}/lfs/{oid}?signature={signature}"}
                if size > self.multipart_size and "multipart" in asked["transfers"]:
                    count = -(-size // self.multipart_size)
                    upload["header"] = {str(n + 1): f"{upload['href']}&part={n + 1}" for n in range(count)}
                    upload["header"]["chunk_size"] = str(self.multipart_size)
                verify = {"href": f"{self.url}/{repo.id}.git/info/lfs/objects/verify"}
                objects[-1]["actions"] = {"upload": upload, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    def upload_of(self, request, oid: str) -> tuple[str, Repo, int]:
        signature = request.query.get("signature", [""])[0]
        repo, asked, size = self._uploads.get(signature, (None, None, 0))
        if asked != oid or "Authorization" in request.headers:  # the Hub's storage refuses a user's token
            raise HubError(403, "SignatureDoesNotMatch")
        return signature, repo, size

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_put(self, request, oid):
        signature, repo, size = self.upload_of(request, oid)
        if "part" in request.query:
            self._parts.setdefault(signature, {})[int(request.query["part"][0])] = request.body
        else:
            self.store(repo, oid, size, request.body)
        return 200, b"", {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'}

    @route("POST", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_complete(self, request, oid):
        signature, repo, size = self.upload_of(request, oid)
        parts = self._parts.pop(signature)
        self.store(repo, oid, size, b"".join(parts[p["partNumber"]] for p in json.loads(request.body)["parts"]))
        return {}

    def store(self, repo: Repo, oid: str, size: int, data: bytes):
        if hashlib.sha256(data).hexdigest() != oid or len(data) != size:
            raise HubError(400, "BadDigest: the object is not what was announced")
        repo.lfs[oid] = data

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/verify")
    def lfs_verify(self, request, repo):
        repo, asked = self.readable(request, repo), json.loads(request.body)
        if len(repo.lfs.get(asked["oid"], b"")) != asked["size"]:
            raise HubError(404, "The object does not exist or has another size")
        return {}

    @route("POST", f"/api/models/{REPO}/commit/(?P<rev>[^/]+)")
    def commit(self, request, repo, rev):
        create_pr = "create_pr" in request.query
        repo = self.readable(request, repo)
        user = self.user(request) if create_pr else self.writable(request, repo.id)[1]
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if rev not in repo.refs:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        parent = repo.resolve(rev)
        header, *operations = [json.loads(line) for line in request.body.splitlines() if line]
        if header["value"].get("parentCommit", parent.sha) != parent.sha:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        if not header["value"]["summary"]:
            raise HubError(400, "A commit needs a summary")
        files = dict(parent.files)
        for operation in operations:
            self.apply(repo, files, operation["key"], operation["value"])
        if "README.md" in files and (errors := card_errors(files["README.md"].data.decode())):
            raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
        # from here on nothing can fail
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        new = Commit(header["value"]["summary"], header["value"]["description"], user, parent.sha, files)
        repo.add(f"refs/pr/{number}" if create_pr else rev, new)
        answer = {"success": True, "commitOid": new.sha, "commitUrl": f"{self.url}/{repo.id}/commit/{new.sha}"}
        return answer | ({"pullRequestUrl": f"{self.url}/{repo.id}/discussions/{number}"} if create_pr else {})

    def apply(self, repo: Repo, files: dict[str, File], key: str, value: dict):
        path = value["path"]
        if key == "file":
            data = base64.b64decode(value["content"])
            if len(data) >= self.lfs_size or data and path.endswith((".safetensors", ".png")):
                raise HubError(400, f"{path} must be uploaded with LFS")
            files[path] = File(data, lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in repo.lfs:
                raise HubError(400, f"The LFS object of {path} was never uploaded: {value['oid']}")
            files[path] = File(repo.lfs[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or key == "deletedFolder" and name.startswith(f"{path}/")]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise HubError(400, f"Unknown operation: {key}")

    # reading

    @route("GET", f"/api/models/{REPO}(/revision/(?P<rev>[^/]+))?")
    def model_info(self, request, repo, rev="main"):
        repo = self.readable(request, repo)
        commit = repo.resolve(rev)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in request.query:
            for sibling in siblings:
                entry = commit.files[sibling["rfilename"]].entry("")
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    sibling["lfs"] = {**entry["lfs"], "sha256": entry["lfs"]["oid"]}
        card = commit.files.get("README.md")
        info = {"_id": repo.id, "id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0], "sha": commit.sha}
        info |= {"private": repo.private, "gated": False, "disabled": False, "lastModified": commit.date}
        return info | {"siblings": siblings, "cardData": card_metadata(card.data.decode())[0] if card else None}

    @route("GET", f"/api/models/{REPO}/refs")
    def refs(self, request, repo):
        answer = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for name, sha in self.readable(request, repo).refs.items():
            kind, ref = ("pullRequests", name) if name.startswith("refs/") else ("branches", f"refs/heads/{name}")
            answer[kind].append({"name": name, "ref": ref, "targetCommit": sha})
        return answer

    @route("GET", f"/api/models/{REPO}/tree/(?P<rev>[^/]+)(/(?P<path>.+))?")
    def tree(self, request, repo, rev, path=""):
        files = self.readable(request, repo).resolve(rev).files
        prefix = f"{path}/" if path else ""
        below = {name: file for name, file in sorted(files.items()) if name.startswith(prefix)}
        if not below:
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound")
        folders = {name[: i + len(prefix)] for name in below for i, c in enumerate(name[len(prefix) :]) if c == "/"}
        if request.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            below = {name: file for name, file in below.items() if "/" not in name[len(prefix) :]}
            folders = {folder for folder in folders if "/" not in folder[len(prefix) :]}
        entries = [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in sorted(folders)]
        return entries + [file.entry(name) for name, file in below.items()]

    @route("POST", f"/api/models/{REPO}/paths-info/(?P<rev>[^/]+)")
    def paths_info(self, request, repo, rev):
        files = self.readable(request, repo).resolve(rev).files
        return [files[path].entry(path) for path in parse_qs(request.body.decode())["paths"] if path in files]

    @route("GET", f"/{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
    def resolve(self, request, repo, rev, path):
        commit = self.readable(request, repo).resolve(rev)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if path not in commit.files:
            error = HubError(404, "Entry not found", "EntryNotFound")
            return 404, error.body, error.headers | headers
        file = commit.files[path]
        headers["ETag"] = f'"{file.sha256 if file.lfs else file.git_oid}"'
        if file.lfs:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(file.data))}
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", "")):
            size, (first, last) = len(file.data), match.groups()
            start, stop = (int(first), min(int(last or size), size - 1) + 1) if first else (size - int(last), size)
            if start >= size:
                return 416, b"", headers | {"Content-Range": f"bytes */{size}"}
            return 206, file.data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        return 200, file.data, headers


# HTTP


def cut(connection: socket.socket):
    """The other side sees a reset, as from a machine that went away."""
    with contextlib.suppress(OSError):  # it is closed already
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False
    hub: HubServer

    def __init__(self, *args):
        self.connections: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        pass  # clients that hang up, and connections cut on purpose


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_):
        pass

    def body_chunks(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            left = int(self.headers.get("Content-Length", 0))
            while left and (chunk := self.rfile.read(min(left, 65536))):
                left -= len(chunk)
                yield chunk
            if left:
                raise ConnectionError("the client hung up in the middle of its request")

    def serve(self):
        hub = self.server.hub
        seen = Request(self.command, self.path, dict(self.headers))
        hub.requests.append(seen)
        fault = hub.fault_of(self.command, self.path)
        if fault and not fault.after and isinstance(fault.action, str):
            next(self.body_chunks(), None)  # in the middle of it, where it is long
            return self.go_away(fault)
        status, body, headers = 500, {"error": "Internal Server Error"}, {}
        request_body = b"".join(self.body_chunks())
        if fault and not fault.after:
            status, body = fault.action, {"error": f"{fault.action}, on purpose"}
        else:
            try:
                status, body, headers = hub.answer(self, request_body)
            except Exception:  # this server's own bug: a test must not take it for the Hub's answer
                hub.errors.append(traceback.format_exc())
        if fault and fault.after:
            return self.go_away(fault)
        seen.status = status
        self.send(status, body, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def send(self, status: int, body: dict | list | bytes, headers: dict[str, str]):
        data = body if isinstance(body, bytes) else json.dumps(body, default=str).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def go_away(self, fault: Fault):
        self.close_connection = True
        if fault.action == "die":
            self.server.hub.stop()
        cut(self.connection)
