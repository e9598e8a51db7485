"""The Hugging Face hub on this machine: a server that speaks its API, and a cache as it is filled."""

import hashlib
import json
import shutil
from copy import copy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

MODEL = "maker/model"


def lay_out(checkpoints: dict[str, Path], repository: str, cache: Path) -> None:
    """Fill a cache of huggingface_hub with folders {revision: folder}."""
    repository_folder = cache / f"models--{repository.replace('/', '--')}"
    (repository_folder / "refs").mkdir(parents=True)
    for revision, folder in checkpoints.items():
        commit = hashlib.sha1(revision.encode()).hexdigest()
        shutil.copytree(folder, repository_folder / "snapshots" / commit)
        (repository_folder / "refs" / revision).write_text(commit)


class Hub(ThreadingHTTPServer):
    """A server with the repository MODEL, `files` {revision: {file: content}}, and `others`.

    `refuses`, if given, is what it answers everything with: a status and headers.
    """

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.fetched = files, []
        self.others, self.refuses = {}, None

    def of(self, repository):
        """The server with another repository's files in the place of MODEL's."""
        one = copy(self)
        one.files = self.others.get(repository, self.files)
        return one

    def commit(self, revision) -> str:
        """A hash of what a revision holds."""
        return hashlib.sha1(b"".join(self.files[revision].values())).hexdigest()

    def refs(self) -> dict:
        """Half of the revisions as branches, the others as tags."""
        refs = [{"name": name, "ref": name, "targetCommit": "0" * 40} for name in self.files]
        return {"branches": refs[::2], "tags": refs[1::2], "converts": []}

    def tree(self, revision) -> list:
        """The files of a revision."""
        entries = []
        for file, content in self.files[revision].items():
            digest = _digest(file, content)
            entry = {"type": "file", "path": file, "size": len(content), "oid": digest}
            if _is_large(file):
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return entries

    def info(self, revision) -> dict:
        """What the hub says of a revision."""
        siblings = []
        for entry in self.tree(revision):
            sibling = {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]}
            if "lfs" in entry:
                sibling["lfs"] = {**entry["lfs"], "sha256": entry["oid"]}
            siblings.append(sibling)
        return {"id": MODEL, "sha": self.commit(revision), "siblings": siblings}


def _is_large(file):
    return file.endswith((".safetensors", ".bin"))


def _digest(file, content):
    return (hashlib.sha256 if _is_large(file) else hashlib.sha1)(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.server.refuses:
            status, headers = self.server.refuses
            return self.answer(b"{}", headers, status)
        path = unquote(self.path.partition("?")[0]).strip("/")
        owner, name, kind, *rest = path.removeprefix("api/models/").split("/", 4)
        hub = self.server.of(f"{owner}/{name}")
        if kind == "refs":
            return self.answer(json.dumps(hub.refs()).encode())
        revisions = {hub.commit(name): name for name in hub.files} | {
            name: name for name in hub.files
        }
        revision = revisions[rest[0]]
        if kind in ("revision", "tree"):
            said = hub.info(revision) if kind == "revision" else hub.tree(revision)
            return self.answer(json.dumps(said).encode())
        content = hub.files[revision][rest[1]]
        if self.command == "GET":
            hub.fetched.append(rest[1])
        etag = f'"{_digest(rest[1], content)}"'
        self.answer(content, {"X-Repo-Commit": hub.commit(revision), "ETag": etag})

    do_HEAD = do_GET

    def answer(self, content, headers=(), status=200):
        self.send_response(status)
        for name, value in {**dict(headers), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass
