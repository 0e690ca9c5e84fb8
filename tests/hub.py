"""A stand-in for the Hugging Face Hub's API, over HTTP: tokens, repositories, commits, large files."""

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

# By token; the last is what Gradio gives for signing in where there is no OAuth.
USERS = {"hf_ann": "ann", "hf_bob": "bob", "mock-oauth-token-for-local-dev": "ann"}


@dataclass
class Hub:
    """What it holds, and how it misbehaves: `lost` large files are cut off in the middle; `gone`: all is."""

    address: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    gated: dict[str, set[str]] = field(default_factory=dict)  # who may read those repositories
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    models: list[dict] = field(default_factory=list)  # that are found by a search
    lost: int = 0
    gone: bool = False

    def reset(self) -> None:
        """As new, at the same address."""
        self.__init__(self.address)


# Of the Hub's list, what the models of the catalogue have.
LICENCES = ("apache-2.0", "mit", "openrail++", "creativeml-openrail-m", "gemma", "cc-by-nc-4.0")
LICENCES += ("unknown", "other")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    @property
    def user(self) -> str:
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        return USERS.get(token, "bad" if token else "")

    def body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status: int, found=None, code: str = "", **headers) -> None:
        data = found if isinstance(found, bytes) else json.dumps(found or {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if self.hub.gone:
            self.hang_up()
            return
        self.hub.asked.append((self.command, path))
        parts, body = path.split("/"), self.body()
        if self.user == "bad":
            self.answer(401, {"error": "Invalid username or password."})
        elif path == "api/whoami-v2":
            found = {"name": self.user, "fullname": self.user, "type": "user", "orgs": []}
            found |= {"id": self.user, "isPro": False, "avatarUrl": "", "auth": {"accessToken": {}}}
            self.answer(200 if self.user else 401, found)
        elif path == "api/models":
            asked = parse_qs(urlsplit(self.path).query)
            words = asked["search"][0].lower()
            assert asked["filter"] == ["diffusers"] and asked["sort"] == ["downloads"]
            self.answer(200, [model for model in self.hub.models if words in model["id"].lower()])
        elif path == "api/repos/create":
            self.create(json.loads(body))
        elif path == "api/validate-yaml":
            said = re.search(r'^license: "?([^"\n]*)', json.loads(body)["content"], re.MULTILINE)
            wrong = said is not None and said[1] not in LICENCES
            message = f'"license" must be one of {LICENCES}'
            errors = [{"message": message}] if wrong else []
            self.answer(400 if wrong else 200, {"errors": errors, "warnings": []})
        elif parts[0] == "blob":
            self.blob(parts[1], body)
        elif "info/lfs/objects/batch" in path:
            self.batch(json.loads(body))
        else:
            self.of_repo(parts, body)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815 - http.server's names

    def create(self, asked: dict) -> None:
        owner = asked.get("organization") or self.user
        name = f"{owner}/{asked['name']}"
        if not self.user or owner != self.user:
            self.answer(403 if self.user else 401, {"error": "You don't have the rights."})
            return
        there = name in self.hub.repos
        self.hub.repos.setdefault(name, {".gitattributes": b""})
        self.hub.private.setdefault(name, bool(asked.get("private") or asked.get("visibility") == "private"))
        found = {"url": f"{self.hub.address}/{name}", "name": name, "id": name}
        self.answer(409 if there else 200, found)

    def of_repo(self, parts: list[str], body: bytes) -> None:
        parts = parts[2:] if parts[:2] == ["api", "models"] else parts
        name, rest = "/".join(parts[:2]), parts[2:]
        files = self.hub.repos.get(name)
        if files is None or (self.hub.private[name] and self.user != name.split("/")[0]):
            self.answer(404 if self.user else 401, {"error": "Repository not found"}, "RepoNotFound")
        elif rest[:1] in (["resolve"], ["auth-check"]) and not self.may_read(name):
            self.answer(403 if self.user else 401, {"error": "Access to it is restricted."}, "GatedRepo")
        elif rest[:1] == ["auth-check"]:
            self.answer(200, {})
        elif rest[:1] == ["resolve"]:
            self.resolve(files, "/".join(rest[2:]))
        elif rest[:1] == ["preupload"]:
            asked = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            found = [
                {"path": f["path"], "uploadMode": mode[f["size"] > 10_000], "shouldIgnore": False}
                for f in asked
            ]
            self.answer(200, {"files": found})
        elif rest[:1] == ["commit"]:
            self.commit(name, files, body)
        elif rest[:1] == ["tree"]:
            found = [{"type": "file", "path": p, "oid": "0", "size": len(d)} for p, d in files.items()]
            self.answer(200, found)
        else:
            siblings = [{"rfilename": path} for path in files]
            self.answer(200, {"id": name, "modelId": name, "sha": "0" * 40, "siblings": siblings, "tags": []})

    def may_read(self, name: str) -> bool:
        return name not in self.hub.gated or self.user in self.hub.gated[name]

    def commit(self, name: str, files: dict[str, bytes], body: bytes) -> None:
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        url = f"{self.hub.address}/{name}/commit/{'1' * 40}"
        self.answer(200, {"commitUrl": url, "commitOid": "1" * 40, "success": True})

    def batch(self, asked: dict) -> None:
        objects = [
            {"oid": o["oid"], "size": o["size"]}
            | {"actions": {"upload": {"href": f"{self.hub.address}/blob/{o['oid']}"}}}
            for o in asked["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def blob(self, oid: str, body: bytes) -> None:
        if self.hub.lost:
            self.hub.lost -= 1
            self.hang_up()
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self.answer(200)

    def resolve(self, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            self.answer(404, {"error": "Entry not found"}, "EntryNotFound")
            return
        etag, data = f'"{hashlib.sha256(files[path]).hexdigest()}"', files[path]
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        found = data[int(part[1]) : int(part[2]) + 1] if part else data
        self.answer(206 if part else 200, found, ETag=etag, X_Repo_Commit="0" * 40)


def settings(address: str, home) -> dict[str, str]:
    """The environment of a process that takes the stand-in for the Hub."""
    return {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(home / "hf"),
        "ECODIFF_HOME": str(home),
    }


@contextmanager
def running():
    """A Hub on a free port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
