"""The checkpoints of a run on the Hugging Face hub, each a revision of a repository, by training step.

What holds for `cache` and for errors is said in hub_files.py. Remote code is never run.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from huggingface_hub import scan_cache_dir
from safetensors import SafetensorError
from scipy.optimize import linear_sum_assignment
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from latentree.inside.names import Internals
from latentree.series.checkpoints import LocalSeries, new_folder, without_bars
from latentree.series.hub_files import (
    Revision,
    cache_folder,
    cached,
    digest_of,
    fetch,
    hub,
    look_up,
    of_model,
    of_tokenizer,
    offline,
    reason,
    told,
    write_ref,
)

STEP = re.compile(
    r"(?:stage1-)?step(\d+)(?:-tokens(\d+(?:\.\d+)?)([KMBT]?))?"
)  # OLMo 2 puts the stage first
SCALES = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def revisions(repository: str, cache=None) -> dict[int, str]:
    """{training step: revision} of the branches and tags that name a step (step1000, step1000-tokens4B), by step."""
    folder = cache_folder(repository, cache)
    if offline() and not folder.is_dir():
        raise ValueError(
            f"{repository}: is not in {folder.parent}; mend the name, or unset HF_HUB_OFFLINE and connect"
        )
    if offline():
        names = [
            ref.name for ref in (folder / "refs").glob("*") if of_model(cached(folder, ref.name)[1])
        ]
    else:
        with told(repository):
            refs = hub().list_repo_refs(repository)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
    named = {
        int(match[1]): match[0]
        for match in map(STEP.fullmatch, sorted(names, reverse=True))
        if match
    }
    if not named:
        raise ValueError(
            f"{repository}: no revision names a training step (step1000, say); give {{step: revision}} yourself"
        )
    return dict(sorted(named.items()))


def tokens_of(revision: str) -> float | None:
    """The training tokens in a revision's name (step1000-tokens4B: 4e9); None if it has none."""
    match = STEP.fullmatch(revision)
    return float(round(float(match[2]) * SCALES[match[3]])) if match and match[2] else None


def choose(steps, count: int, spacing: str) -> list[int]:
    """`count` of the steps, the first and the last among them, spaced "even" or "log"; all, if there are no more.

    The others are as near to the ideal grid as distinct steps can be, in sum. In log spacing a step 0 is taken beside the
    grid, which starts at the step after it.
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
    """A note on the distances above 3 times the median, if the steps are regular but for them; else nothing.

    Regular: the upper quartile of the distances is at most 3 times the lower, which log-spaced steps are not.
    """
    steps = sorted(set(steps))
    distances = np.diff(steps)
    if len(distances) < 3 or np.quantile(distances, 0.75) > 3 * np.quantile(distances, 0.25):
        return ""
    wide = np.flatnonzero(distances > 3 * np.median(distances))
    return "; ".join(
        f"no checkpoints between steps {steps[i]:,} and {steps[i + 1]:,}" for i in wide
    )


def load_tokenizer(repository: str, revision: str, cache=None):
    """The tokenizer of a revision, as AutoTokenizer makes it."""
    found = look_up(repository, revision, cache, of_tokenizer)
    folder = fetch(found, cache)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises no other kind
        raise ValueError(
            f"{found}: its tokenizer cannot be loaded ({reason(error)}); name one that can"
        ) from None


class HubSeries:
    """Revisions {step: name} of a repository as a series; `identity` has the commits and the weights' hashes.

    Revisions with the same weights as an earlier one are left out with a warning. Before any download, when the series is
    made, ValueError if it comes to more than `download_limit_gb` (1e9 bytes), or the disk has no room for it.

    With `free`, once a revision is loaded, the one loaded before and those of earlier steps are removed from the cache,
    whoever put them there: of what this downloads, two at most are on the disk. Offline nothing is removed.
    """

    def __init__(
        self,
        repository: str,
        revisions: dict[int, str],
        free=False,
        download_limit_gb=None,
        cache=None,
    ):
        self.repository, self.free, self._cache, self._before = repository, free, cache, None
        self._folder, self._found = cache_folder(repository, cache), {}
        for step, name in sorted(revisions.items()):
            found = look_up(repository, name, cache)
            twin = next(
                (other for other in self._found.values() if other.weights == found.weights), None
            )
            if twin:
                warnings.warn(
                    f"{repository}: {name} has the same weights as {twin.name}, and is left out",
                    stacklevel=2,
                )
            else:
                self._found[step] = found
        if not self._found:
            raise ValueError(
                f"revisions: {revisions} of {repository} has no step; give {{step: revision}}"
            )
        self.steps = list(self._found)
        self.revisions = {step: found.name for step, found in self._found.items()}
        commits = {
            found.name: {"commit": found.commit, "files": found.weights}
            for found in self._found.values()
        }
        self.identity = {"repository": repository, "revisions": commits}
        self._check_room(download_limit_gb)

    def _missing(self, found: Revision) -> int:
        """Bytes of a revision that are not in the cache."""
        there = self._folder / "snapshots" / found.commit
        return sum(
            size
            for file, (size, digest) in found.files.items()
            if not (there / file).exists() and not (self._folder / "blobs" / digest).exists()
        )

    def _check_room(self, limit_gb) -> None:
        missing, cache = (
            sorted(map(self._missing, self._found.values())),
            self._folder.parent.absolute(),
        )
        needed, held = sum(missing) / 1e9, sum(missing[-2:] if self.free else missing) / 1e9
        if limit_gb is not None and needed > limit_gb:
            raise ValueError(
                f"{self.repository}: download of {needed:,.1f} GB is above download_limit_gb = {limit_gb:g}: "
                "choose fewer revisions or raise the limit"
            )
        room = (
            shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
            / 1e9
        )
        if held > room:
            raise ValueError(
                f"{cache}: {held:,.1f} GB are to be held at once, and its disk has room for {room:,.1f} GB; "
                "choose fewer revisions, set free=True, or set HF_HUB_CACHE to a larger disk"
            )

    @property
    def download_bytes(self) -> int:
        """Bytes still to be fetched: of all revisions, what is not in the cache."""
        return sum(map(self._missing, self._found.values()))

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest revision."""
        return max(found.bytes for found in self._found.values())

    def describe(self) -> pd.DataFrame:
        """The revisions as a table: step, revision, commit, gigabytes (1e9 bytes), in cache."""
        rows = [
            (step, found.name, found.commit[:8], found.bytes / 1e9, not self._missing(found))
            for step, found in self._found.items()
        ]
        return pd.DataFrame(rows, columns=["step", "revision", "commit", "gigabytes", "in cache"])

    def config(self):
        """The transformers config of its models; of the weights nothing is fetched."""
        found = self._found[self.steps[-1]]
        with told(found):
            file = hub().hf_hub_download(
                self.repository,
                "config.json",
                revision=found.commit,
                cache_dir=self._folder.parent,
                local_files_only=offline(),
            )
            return AutoConfig.from_pretrained(Path(file).parent, trust_remote_code=False)

    def load(self, step: int, device="cpu", dtype=torch.float32, **options):
        """The model at `step`, ready to be measured; `options` go to from_pretrained (attn_implementation, say)."""
        if step not in self._found:
            raise ValueError(
                f"step: {step} has no revision of {self.repository}; choose one of {self.steps}"
            )
        freeing, found = self.free and not offline(), self._found[step]
        lock = (
            self._folder.parent / ".locks" / self._folder.name / "free.lock"
        )  # for processes that free what others read
        with told(found), FileLock(lock) if freeing else nullcontext():
            model = self._open(found, dtype, options)
            if freeing:
                self._release(step)
        return model.to(device).eval()

    def _open(self, found: Revision, dtype, options):
        folder = fetch(found, self._cache)
        safe = any(file.endswith(".safetensors") for file in found.weights)
        try:
            with without_bars():
                model, report = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=dtype,
                    use_safetensors=safe,
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **options,
                )
            Internals(model)
        except (
            OSError,
            ValueError,
            KeyError,
            RuntimeError,
            SafetensorError,
            UnpicklingError,
        ) as error:
            raise ValueError(
                f"{found}: cannot be loaded ({reason(error)}); choose another revision, or mend {options=}"
            ) from None
        if missing := sorted(report["missing_keys"]):  # transformers has drawn them at random
            raise ValueError(
                f"{found}: lacks the weights {missing[0]} (and {len(missing) - 1} more); choose another revision"
            )
        return model

    def _release(self, step: int) -> None:
        """Remove the revision loaded before from the cache, and those of earlier steps, which a killed run may have left."""
        stale = {
            found.commit
            for other, found in self._found.items()
            if other < step or other == self._before
        }
        there = [
            self._folder / "snapshots" / commit
            for commit in sorted(stale - {self._found[step].commit})
        ]
        there, self._before = [path for path in there if path.exists()], step
        if there:
            scanned = scan_cache_dir(self._folder.parent)
            scanned.delete_revisions(*(path.name for path in there)).execute()
        if left := [
            path for path in there if path.exists()
        ]:  # huggingface_hub leaves alone what it finds in disorder
            why = next(
                (reason(note) for note in scanned.warnings if str(self._folder) in str(note)),
                "no reason given",
            )
            raise ValueError(
                f"{left[0]}: cannot be removed from the cache ({why}); remove it by hand, or set free=False"
            )


def lay_out(series: LocalSeries, repository: str, cache: Path, tokens_per_step: int) -> None:
    """Write a local run's checkpoints as a cache of huggingface_hub has them, revisions named step1000-tokens2.5M.

    Commits and blobs are hashes of the contents, so that a second call changes nothing; a revision is seen once it is whole.
    """
    folder = cache_folder(repository, cache)
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    for step, checkpoint in series:
        hashes = {file.name: digest_of(file) for file in sorted(checkpoint.iterdir())}
        snapshot = folder / "snapshots" / hashlib.sha1(json.dumps(hashes).encode()).hexdigest()
        for name, digest in hashes.items():
            if not (blob := folder / "blobs" / digest).exists():
                shutil.copyfile(checkpoint / name, partial := blob.with_suffix(".incomplete"))
                os.replace(partial, blob)
        if not all((snapshot / name).exists() for name in hashes):
            with new_folder(snapshot) as partial:
                for name, digest in hashes.items():
                    try:
                        (partial / name).symlink_to(Path("..", "..", "blobs", digest))
                    except OSError:
                        shutil.copyfile(folder / "blobs" / digest, partial / name)
        millions = f"{step * tokens_per_step / 1e6:.3f}".rstrip("0").rstrip(".")
        write_ref(folder, f"step{step}-tokens{millions}M", snapshot.name)
