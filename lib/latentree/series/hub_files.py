"""The files of one revision of a repository on the Hugging Face hub, looked up, fetched and checked.

Everything is also read from the hub's local cache, and only from there where HF_HUB_OFFLINE=1 is set; `cache` is its
folder, huggingface_hub's own unless given. What fails is told as ValueError with the mend.
"""

import errno
import hashlib
import json
import os
import re
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

from latentree.data.files import write_text
from latentree.inside.names import NAMES
from latentree.series.checkpoints import without_bars

TOKENIZER = "tokenizer* vocab* merges.txt special_tokens_map.json added_tokens.json *.model chat_template* config.json".split()


@dataclass(frozen=True)
class Revision:
    """A revision, its commit, and {file: (bytes, hash)} of the files that are wanted: SHA-256, or git's for small ones."""

    repository: str
    name: str
    commit: str
    files: dict[str, tuple[int, str]]

    def __str__(self):
        return f"{self.repository}, revision {self.name}"

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(size for size, _ in self.files.values())

    @property
    def weights(self) -> dict[str, str]:
        """{file: hash} of those with weights."""
        return {
            file: digest for file, (_, digest) in self.files.items() if not file.endswith(".json")
        }


def offline() -> bool:
    """Whether only the cache may be read: asked late, for notebooks set the environment after their imports."""
    return (
        constants.HF_HUB_OFFLINE
        or os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
    )


def hub() -> HfApi:
    """The hub, at the address that the environment gives now."""
    return HfApi(endpoint=(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/"))


def cache_folder(repository: str, cache=None) -> Path:
    """Where the cache keeps a repository."""
    return (
        Path(cache or constants.HF_HUB_CACHE).expanduser()
        / f"models--{repository.replace('/', '--')}"
    )


def reason(error: Exception) -> str:
    """What an error says, in one plain line."""
    return " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())[:300] or type(error).__name__


@contextmanager
def told(what):
    """Any error of the hub, the network or the disk becomes a ValueError about `what`."""
    try:
        yield
    except ValueError:
        raise
    except (OSError, HTTPError, RuntimeError, ValueError) as error:
        if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
            error = error.__cause__  # why huggingface_hub looked into the cache
        status = getattr(getattr(error, "response", None), "status_code", None)
        mend = f"cannot be had ({reason(error)}); mend the name, connect and run again (it goes on), or set a local series"
        if status in (401, 403):  # the hub does not tell strangers what exists
            mend = f"is gated, private or unknown (HTTP {status}); mend the name, or accept its licence and set HF_TOKEN"
        elif status == 404:
            mend = f"is not at {hub().endpoint}; mend the name, or choose what revisions() lists"
        elif getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            mend = "does not fit on the disk of the cache; make room, set free=True, or set HF_HUB_CACHE to a larger disk"
        elif offline():
            mend = "is not whole in the cache; choose what revisions() lists, or unset HF_HUB_OFFLINE and connect"
        raise ValueError(f"{what}: {mend}") from None


def of_model(names) -> list[str]:
    """The files of a model among `names`: config.json and the weights that transformers takes; none if they are not whole."""
    for stem, end in (("model", "safetensors"), ("pytorch_model", "bin")):
        whole, index = f"{stem}.{end}", f"{stem}.{end}.index.json"
        shards = sorted(filter(re.compile(rf"{stem}-\d+-of-\d+\.{end}").fullmatch, names))
        together = (
            index in names and shards and len(shards) == int(re.search(r"-of-(\d+)", shards[0])[1])
        )
        weights = [whole] if whole in names else [index, *shards] if together else []
        if weights and "config.json" in names:
            return ["config.json", *weights]
    return []


def of_tokenizer(names) -> list[str]:
    """The files of a tokenizer among `names`, with the config.json that tells its class; none if there is no other."""
    found = [
        name
        for name in names
        if "/" not in name and any(fnmatch(name, pattern) for pattern in TOKENIZER)
    ]
    return found if found != ["config.json"] else []


def digest_of(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def cached(folder: Path, name: str) -> tuple[str, dict[str, Path]]:
    """The commit of a revision, and its files that a repository's folder in the cache has."""
    ref = folder / "refs" / name
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else name
    return commit, {
        path.name: path for path in (folder / "snapshots" / commit).glob("*") if path.is_file()
    }


def look_up(repository: str, name: str, cache, wanted=of_model) -> Revision:
    """A revision as the hub has it, or as the cache has it if offline, with the files that `wanted` takes of their names."""
    with told(f"{repository}, revision {name}"):
        if offline():
            commit, paths = cached(cache_folder(repository, cache), name)
            # Blobs are named by their hash; a file that is no link (Windows) has no such name.
            files = {
                file: (
                    path.stat().st_size,
                    Path(os.readlink(path)).name if path.is_symlink() else digest_of(path),
                )
                for file in wanted(paths)
                for path in [paths[file]]
            }
        else:
            info = hub().model_info(repository, revision=name, files_metadata=True)
            commit, found = info.sha, {file.rfilename: file for file in info.siblings}
            files = {
                file: (
                    found[file].size,
                    found[file].lfs.sha256 if found[file].lfs else found[file].blob_id,
                )
                for file in wanted(found)
            }
    if not files:
        kind = (
            "tokenizer"
            if wanted is of_tokenizer
            else "model (config.json, model.safetensors or pytorch_model.bin)"
        )
        place = (
            "the cache; unset HF_HUB_OFFLINE and connect, or" if offline() else f"{hub().endpoint};"
        )
        raise ValueError(
            f"{repository}, revision {name}: has no whole {kind} in {place} name a revision or a repository that has"
        )
    return Revision(repository, name, commit, files)


def fetch(revision: Revision, cache) -> Path:
    """The folder with the revision's files; those that are not in the cache are downloaded, and all SHA-256 are checked."""
    folder = cache_folder(revision.repository, cache)
    with told(revision), without_bars():
        for path in (folder / "blobs").glob(
            "*.incomplete"
        ):  # of killed downloads, which huggingface_hub never takes up again
            if time.time() - path.stat().st_mtime > 3600:  # and not of one that goes on elsewhere
                path.unlink(missing_ok=True)
        for file, (_, expected) in revision.files.items():
            path = Path(
                hub().hf_hub_download(
                    revision.repository,
                    file,
                    revision=revision.commit,
                    cache_dir=folder.parent,
                    local_files_only=offline(),
                )
            )
            if len(expected) == 64 and (found := digest_of(path)) != expected:
                path.resolve().unlink()  # the blob that it links to
                path.unlink(missing_ok=True)
                raise ValueError(
                    f"{revision}: {file} has SHA-256 {found}, expected {expected}, and was removed from the cache; "
                    "run again with the network"
                )
            kind = (
                json.loads(path.read_text(encoding="utf-8")).get("model_type")
                if file == "config.json"
                else None
            )
            if (
                file == "config.json" and revision.weights and kind not in NAMES
            ):  # before any weights are fetched
                raise ValueError(
                    f"{revision}: architecture = {kind!r} has no names here; use one of {', '.join(NAMES)}"
                )
    with suppress(OSError):  # a cache that can only be read
        write_ref(folder, revision.name, revision.commit)
    return path.parent


def write_ref(folder: Path, name: str, commit: str) -> None:
    """Note which commit a revision is, so that it is found offline."""
    ref = folder / "refs" / name
    if name != commit and not (ref.is_file() and ref.read_text(encoding="utf-8") == commit):
        ref.parent.mkdir(parents=True, exist_ok=True)
        write_text(ref, commit)
