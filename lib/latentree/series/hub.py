"""The checkpoints of a run on the Hugging Face hub, each a revision of a repository, by step.

huggingface_hub fetches the files, goes on where a download broke, and keeps them in its cache; with
HF_HUB_OFFLINE=1 in the environment the cache alone is read. Code of a repository is never run.
"""

import os
import re
import shutil
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import filter as matching
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from huggingface_hub import HfApi, constants, scan_cache_dir, snapshot_download
from huggingface_hub import try_to_load_from_cache as in_cache
from huggingface_hub.errors import CacheNotFound, GatedRepoError, HfHubHTTPError, HTTPError
from scipy.optimize import linear_sum_assignment
from transformers import AutoConfig

from latentree.inside.names import NAMES
from latentree.series.checkpoints import load_whole

# step1000-tokens4B, step-001000-2BT, global_step60, checkpoint-100, ckpt_000, stage1-step-40000
_STEP = re.compile(
    r"(?:stage(?P<stage>\d+)-(?:ingredient\d+-)?)?(?:global_)?(?:step|checkpoint|ckpt)[-_]?"
    r"(?P<step>\d+)(?:-(?:tokens)?(?P<tokens>\d+(?:\.\d+)?)(?P<scale>[KMBT]?)T?)?"
)
_SCALES = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_MENDS = [  # what huggingface_hub raises, and what to do then
    (GatedRepoError, "ask for access on its page, and log in by `hf auth login`"),
    (CacheNotFound, "give the cache that has it (HF_HUB_CACHE), or unset HF_HUB_OFFLINE"),
    (HfHubHTTPError, "look at its name, log in again by `hf auth login`, or try later"),
    (Exception, "look at the network, or set HF_HUB_OFFLINE=1 to read the cache alone"),
]


@contextmanager
def _asking(repository):
    """Within, what huggingface_hub or the network refuses becomes a ValueError with its reason."""
    try:
        yield
    except (HTTPError, CacheNotFound, OSError) as error:
        reason = " ".join(str(error).split())
        mend = next(mend for kind, mend in _MENDS if isinstance(error, kind))
        if getattr(error, "errno", None):  # the file system's: rights, room, a read-only disk
            mend = "give a cache (HF_HUB_CACHE) that can be read and written, or free=False"
        raise ValueError(f"{repository}: {reason}; {mend}") from error


def revisions(repository: str, cache=None) -> dict[int, str]:
    """{training step: revision} of the branches and tags that name a step, in order of steps.

    Such names are step1000-tokens4B, step-001000-2BT, checkpoint-100 or stage1-step-40000. Those of
    later stages are told of in a warning: steps of some begin anew. ValueError if there is none.
    """
    where = ""
    if constants.HF_HUB_OFFLINE:
        where = f"HF_HUB_OFFLINE: in {cache or constants.HF_HUB_CACHE} "
        names = [name for name, files in _cached(repository, cache).items() if _of_model(files)]
    else:
        with _asking(repository):
            refs = HfApi().list_repo_refs(repository)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
    named, later = {}, []
    for name in sorted(names):
        match = _STEP.fullmatch(name)
        if match and match["stage"] not in (None, "1"):
            later.append(name)
        elif match:
            named.setdefault(int(match["step"]), name)
    if later:
        told = f"{repository}: {len(later)} revisions of later stages are left out, as {later[0]}"
        warnings.warn(f"{told}; give {{step: revision}} to measure them", stacklevel=2)
    if not named:
        there = ", ".join(sorted(names)[:3]) or "there is none"
        told = f"no revision names a training step ({there}); give them as named"
        raise ValueError(f"{repository}: {where}{told}")
    return dict(sorted(named.items()))


def _cached(repository, cache) -> dict[str, dict]:
    """What the cache has: {revision: {file name: what huggingface_hub says of the file}}."""
    found = {}
    with _asking(repository):
        scanned = scan_cache_dir(cache)
    for repo in scanned.repos:
        if repo.repo_id == repository:
            for revision in repo.revisions:
                files = {file.file_name: file for file in revision.files}
                found |= {name: files for name in revision.refs}
    return found


def _of_model(names) -> list[str]:
    """The files of a model among `names`: config.json and one kind of weights; or none."""
    for pattern in ("model*.safetensors*", "pytorch_model*.bin*"):
        weights = matching(names, pattern)
        if weights and "config.json" in names:
            return ["config.json", *sorted(weights)]
    return []


def tokens_of(revision: str) -> float | None:
    """The training tokens in a revision's name (step1000-tokens4B: 4e9); None if it has none."""
    match = _STEP.fullmatch(revision)
    if not match or not match["tokens"]:
        return None
    return float(round(float(match["tokens"]) * _SCALES[match["scale"]]))


def choose(steps, count: int, spacing: str) -> list[int]:
    """`count` of the steps, the first and the last among them, spaced "even" or "log"; or all.

    The others are as near to the ideal grid as distinct steps can be, in sum. In log spacing a step
    0 is taken beside the grid, which starts at the step after it.
    """
    steps = sorted(set(steps))
    if spacing not in ("even", "log") or count < 2:
        raise ValueError(f"count = {count}, spacing = {spacing!r}: give 2 or more, and even or log")
    if len(steps) <= count:
        return steps
    beside = int(spacing == "log" and steps[0] == 0)
    places = np.log(steps[beside:]) if spacing == "log" else np.array(steps, float)
    inner = slice(1 - beside, -1)
    grid = np.linspace(places[0], places[-1], count - beside)[inner]
    _, nearest = linear_sum_assignment(abs(grid[:, None] - places[inner]))
    return [steps[0], *(steps[1 + i] for i in sorted(nearest)), steps[-1]]


def gaps(steps) -> str:
    """A note on the distances above 3 times the median, if the steps are regular but for them.

    Regular: the upper quartile of the distances is at most 3 times the lower, which log-spaced
    steps are not.
    """
    steps = sorted(set(steps))
    distances = np.diff(steps)
    if len(distances) < 3 or np.quantile(distances, 0.75) > 3 * np.quantile(distances, 0.25):
        return ""
    wide = np.flatnonzero(distances > 3 * np.median(distances))
    notes = [f"no checkpoints between steps {steps[i]:,} and {steps[i + 1]:,}" for i in wide]
    return "; ".join(notes)


@dataclass(frozen=True)
class _Revision:
    name: str
    commit: str
    files: dict[str, tuple[int, str]]  # of its model: {file: (bytes, hash)}

    @property
    def weights(self) -> set[str]:
        """The hashes of its weights."""
        return {found[1] for file, found in self.files.items() if not file.endswith(".json")}

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(size for size, _ in self.files.values())


class HubSeries:
    """Revisions {step: name} of a repository as a series, like `checkpoints.LocalSeries`.

    Where revisions share a file of weights, one label at least is wrong and nobody can say which:
    none of them is kept, with a warning. Nor is one that has those of a revision listed just before
    or after it (`among`, all that there are, by step), or of the branch main, which are the end of
    training, unless it is the last. Before any download ValueError if none is left, if
    it comes to more than `download_limit_gb` (1e9 bytes), or the disk has no room for it.
    `identity` has the commits. `cache` is huggingface_hub's own unless given.

    With `free`, before a revision is loaded, the one loaded before and those of earlier steps are
    removed from the cache, whoever put them there: one at a time is on the disk. Offline nothing is
    removed.
    """

    def __init__(
        self, repository, revisions, free=False, download_limit_gb=None, cache=None, among=None
    ):
        self.repository = repository
        self._cache = Path(cache or constants.HF_HUB_CACHE)
        self._free = free and not constants.HF_HUB_OFFLINE
        self._loaded = None
        self._found = {step: self._look_up(name) for step, name in sorted(revisions.items())}
        listed, shared = sorted(among or revisions), Counter()
        beside = {listed.index(step) + by for step in revisions for by in (-1, 1)}
        for place, step in enumerate(listed):
            if step in revisions:
                shared.update(self._found[step].weights)
            elif place in beside:
                shared.update(self._weights(among[step]))
        last, final = max(self._found), self._weights("main")
        contested = [
            step
            for step, found in self._found.items()
            if any(shared[file] > 1 for file in found.weights)
            or (step != last and found.weights & final)
        ]
        if contested:
            names = ", ".join(self._found.pop(step).name for step in contested)
            warnings.warn(f"{repository}: {names} share weights, and are left out", stacklevel=2)
        if not self._found:
            raise ValueError(f"{repository}: all revisions share weights; choose others")
        self.steps = list(self._found)
        self.revisions = {step: found.name for step, found in self._found.items()}
        commits = {found.name: found.commit for found in self._found.values()}
        self.identity = {"repository": repository, "revisions": commits}
        self._check_room(download_limit_gb)

    def _look_up(self, name) -> _Revision:
        """A revision as the hub has it, or offline as the cache has it."""
        if constants.HF_HUB_OFFLINE:
            commit, files = None, {}
            for file, cached in _cached(self.repository, self._cache).get(name, {}).items():
                commit = cached.file_path.parent.name
                files[file] = cached.size_on_disk, str(cached.blob_path)
        else:
            with _asking(self.repository):
                info = HfApi().model_info(self.repository, revision=name, files_metadata=True)
            commit, files = info.sha, {}
            for file in info.siblings:
                files[file.rfilename] = file.size, file.lfs.sha256 if file.lfs else file.blob_id
        wanted = _of_model(files)
        if not wanted:
            raise ValueError(f"{self.repository}, revision {name}: has no weights; choose another")
        return _Revision(name, commit, {file: files[file] for file in wanted})

    def _weights(self, name) -> set[str]:
        """The hashes of a revision's weights; none where they cannot be seen."""
        try:
            return self._look_up(name).weights
        except ValueError:
            return set()

    def _missing(self, found: _Revision) -> int:
        """Bytes of a revision that are not in the cache."""
        missing = 0
        for file, (size, _) in found.files.items():
            if not in_cache(self.repository, file, self._cache, found.commit):
                missing += size
        return missing

    @property
    def download_bytes(self) -> int:
        """Bytes still to be fetched: of all revisions, what is not in the cache."""
        return sum(self._missing(found) for found in self._found.values())

    def _check_room(self, limit_gb) -> None:
        needed = self.download_bytes / 1e9
        if limit_gb is not None and needed > limit_gb:
            raise ValueError(
                f"{self.repository}: download of {needed:,.1f} GB is above download_limit_gb = "
                f"{limit_gb:g}; choose fewer revisions or raise the limit"
            )
        if self._free:
            needed = max(self._missing(found) for found in self._found.values()) / 1e9
        with _asking(self.repository):
            self._cache.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(self._cache).free / 1e9
        if needed > room:
            raise ValueError(
                f"{self._cache}: {needed:,.1f} GB are to be held at once, and its disk has room "
                f"for {room:,.1f} GB; choose fewer revisions, set free=True, or set HF_HUB_CACHE"
            )

    def describe(self) -> pd.DataFrame:
        """The revisions as a table: step, revision, commit, gigabytes (1e9 bytes), in cache."""
        rows = []
        for step, found in self._found.items():
            cached = self._missing(found) == 0
            rows.append((step, found.name, found.commit[:8], found.bytes / 1e9, cached))
        return pd.DataFrame(rows, columns=["step", "revision", "commit", "gigabytes", "in cache"])

    def config(self, step: int | None = None):
        """The transformers config of its models. ValueError for an architecture unknown here."""
        commit = self._found[self.steps[-1] if step is None else step].commit
        with _asking(self.repository):
            config = AutoConfig.from_pretrained(
                self.repository, revision=commit, cache_dir=self._cache, trust_remote_code=False
            )
        if config.model_type not in NAMES:
            known = ", ".join(NAMES)
            raise ValueError(f"{self.repository}: is a {config.model_type}; use one of {known}")
        return config

    def load(self, step: int, device="auto", dtype=torch.float32):
        """The model at `step`, ready to be measured."""
        self.config(step)  # before its weights are fetched
        if self._free:
            self._remove_before(step)
        found = self._found[step]
        with _asking(self.repository):
            folder = snapshot_download(
                self.repository,
                revision=found.name,  # which the cache then knows offline
                cache_dir=self._cache,
                allow_patterns=list(found.files),
            )
        if Path(folder).name != found.commit:
            raise ValueError(f"{self.repository}: {found.name} has moved; make the series again")
        return load_whole(folder, device, dtype)

    def _remove_before(self, step: int) -> None:
        """Remove from the cache the revision loaded before, and those of earlier steps."""
        stale = []
        for other, found in self._found.items():
            gone = other < step or other == self._loaded and other != step
            if gone and self._missing(found) < found.bytes:
                stale.append(found.commit)
        self._loaded = step
        if stale:
            with _asking(self.repository):
                os.utime(self._cache)  # huggingface_hub only logs that it may not remove
                scan_cache_dir(self._cache).delete_revisions(*stale).execute()
