"""Training a small causal model on a corpus stream: one loop, exact resume, checkpoints, tables of losses in nats."""

import difflib
import hashlib
import json
import math
import os
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from latentree.data.corpus import Stream
from latentree.data.files import read_json, write_text
from latentree.data.progress import Reporter
from latentree.series.checkpoints import IDENTITY, checkpoint_steps, remove_partial, save_checkpoint
from latentree.train.model import build_model, check_sizes, next_token_losses, parameter_count
from latentree.train.optimizers import build_optimizers, rate_share
from latentree.train.state import (
    Progress,
    alone,
    check_folder,
    full_disk_told,
    keep_freed_memory,
    load_state,
    remove_states,
    save_state,
)

LOG_ROWS = 500  # rows of losses.csv, about
TABLES = ("losses.csv", "held_out.csv", "held_out_by_position.csv")
CARD = "run_card.json"  # written last: its presence says that the training is finished


class TrainingConfig(BaseModel, extra="forbid", frozen=True, strict=True, allow_inf_nan=False):
    """Everything that decides how a model is trained. ValueError, in one line, for a setting that cannot be."""

    architecture: str = "llama"
    layers: PositiveInt = 4
    width: PositiveInt = 64  # of the residual stream
    heads: PositiveInt = 4
    mlp_width: PositiveInt | None = None  # 4 width if none
    context: int = Field(128, ge=2)  # tokens a sequence
    batch_sequences: PositiveInt = 32  # sequences a step, over all processes
    tokens: PositiveInt = 3_000_000  # trained on in all, rounded up to whole steps
    optimizer: Literal["adamw", "muon"] = "muon"
    learning_rate: PositiveFloat = 3.0e-3  # AdamW's peak
    muon_learning_rate: PositiveFloat = 1.0e-2  # Muon's peak
    weight_decay: NonNegativeFloat = 0.0
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    warmup: float = Field(0.05, ge=0, lt=1)  # fraction of the steps
    schedule: Literal["linear", "cosine"] = "linear"
    gradient_clip: PositiveFloat = 1.0  # largest norm of the gradient
    checkpoints_even: NonNegativeInt = 10
    checkpoints_log: NonNegativeInt = 10
    seed: int = Field(0, ge=0, lt=2**63)  # of the initial weights
    precision: Literal["float32", "bfloat16"] = (
        "float32"  # bfloat16: by autocast, the weights stay float32
    )
    micro_batches: PositiveInt = (
        1  # parts that a process's sequences of a step run in, one after the other: less memory
    )
    compiled: bool = (
        False  # the model by torch.compile: faster on a GPU, after a minute; changes rounding only
    )
    state_every_seconds: NonNegativeFloat = (
        60.0  # at most so much is lost when killed; changes no result
    )

    def __init__(self, **settings):
        try:
            super().__init__(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            name, value = str(first["loc"][0]), first["input"]
            near = difflib.get_close_matches(name, type(self).model_fields, n=1, cutoff=0)[0]
            mend = (
                f"is no setting; did you mean {near}?"
                if first["type"] == "extra_forbidden"
                else first["msg"]
            )
            raise ValueError(f"{name} = {value!r}: {mend[0].lower()}{mend[1:]}") from None

    @property
    def steps(self) -> int:
        """Optimizer steps in the whole training."""
        return math.ceil(self.tokens / (self.batch_sequences * self.context))

    def sizes(self) -> dict:
        """The arguments of `build_model` that are settings here."""
        return self.model_dump(
            include={"architecture", "layers", "width", "heads", "context", "mlp_width"}
        )


def train(
    config, process, held_out, folder, stream=None, device="auto", progress=True
) -> pd.DataFrame:
    """Train a model on `process` in `folder`; start again after any interruption and it goes on, exactly.

    `held_out` is (sequences, context) tokens; `stream` gives batches of (rows, context) tokens, by default of
    `process`; `device` is auto, cpu or cuda; `progress` is whether to show it, or what is told instead (see Reporter).
    Returns losses.csv: step, tokens, loss (nats a token, the mean since the row before) and learning_rate. The folder
    also gets held_out.csv (step, tokens, loss, standard_error over sequences), held_out_by_position.csv (step, position,
    loss of predicting the token after it), the checkpoints step-*, and run_card.json. A finished training is not repeated.

    ValueError if the settings, data and folder do not fit together, if the loss stops being finite, or if the disk is
    full; the last good checkpoint and state stay.
    """
    folder = Path(folder)
    identity = check_run(config, process, held_out, folder, device)
    if (folder / CARD).exists():
        remove_states(folder)
        return pd.read_csv(folder / "losses.csv")
    # Accelerate remembers the first precision and device of a process; a notebook trains several models.
    AcceleratorState._reset_state(reset_partial_state=int(os.environ.get("WORLD_SIZE", 1)) == 1)
    no_gpu = (
        device == "cpu" or not torch.cuda.is_available()
    )  # said to Accelerate, or it sees each of several processes as alone
    accelerator = Accelerator(
        cpu=no_gpu, mixed_precision={"float32": "no", "bfloat16": "bf16"}[config.precision]
    )
    rows, left = divmod(config.batch_sequences, accelerator.num_processes)
    if left:
        raise ValueError(
            f"batch_sequences = {config.batch_sequences}: does not divide over {accelerator.num_processes} processes; "
            f"give a multiple of {accelerator.num_processes}"
        )
    with alone(folder), full_disk_told(folder), no_memory_told(config):
        if accelerator.is_main_process:
            remove_partial(folder)
            write_text(folder / IDENTITY, json.dumps(identity, indent=1))
        accelerator.wait_for_everyone()
        if stream is None:
            first = rows * accelerator.process_index
            options = {"first_row": first, "total_rows": config.batch_sequences}
            stream = Stream(process, rows, config.context, device=accelerator.device, **options)
        loop(config, process, held_out, folder, stream, accelerator, progress)
    return pd.read_csv(folder / "losses.csv")


@contextmanager
def no_memory_told(config):
    """A model that does not fit the memory becomes a ValueError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(
            error, (MemoryError, torch.OutOfMemoryError)
        ) and "can't allocate memory" not in str(error):
            raise
        raise ValueError(
            f"layers = {config.layers}, width = {config.width}, context = {config.context}, batch_sequences = "
            f"{config.batch_sequences}: do not fit the memory; give more micro_batches, or smaller numbers"
        ) from None


def loop(config, process, held_out, folder, stream, accelerator, show):
    """The training itself, from the latest state in `folder` if there is one."""
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    model = build_model(
        vocabulary_size=process.vocabulary_size, seed=config.seed, end=process.end, **config.sizes()
    )
    parameters = parameter_count(model)
    model, *optimizers = accelerator.prepare(model.train(), *build_optimizers(model, config))
    forward = torch.compile(model) if config.compiled else model
    held_out = held_out.to(accelerator.device)
    run = Progress()
    accelerator.register_for_checkpointing(run)
    load_state(accelerator, stream, folder)

    batch_tokens = config.batch_sequences * config.context
    checkpoints = set(
        checkpoint_steps(config.steps, config.checkpoints_even, config.checkpoints_log)
    )
    log_every = max(1, config.steps // LOG_ROWS)
    window, started, saved = [], time.monotonic() - run.seconds, time.monotonic()
    shown = bool(show) and accelerator.is_main_process
    report = (
        show
        if callable(show)
        else Reporter(
            process.name, config.steps * batch_tokens, run.step * batch_tokens, "tokens", shown
        )
    )
    if run.step == 0:
        record(run, config, accelerator, model, held_out, folder)

    while run.step < config.steps:
        share = rate_share(run.step, config.steps, config.warmup, config.schedule)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
        loss = backward(
            accelerator, model, forward, stream.next_batch().chunk(config.micro_batches)
        )
        norm = accelerator.clip_grad_norm_(model.parameters(), config.gradient_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.step += 1
        window.append(loss)
        if run.step % log_every and run.step not in checkpoints:
            continue

        mean = accelerator.reduce(torch.stack(window).mean(), "mean").item()
        window = []
        # A gradient that is not finite has just spoilt the weights, before any loss shows it.
        check_finite(mean + float(norm), run.step, folder)
        run.losses.append((run.step, run.step * batch_tokens, mean, config.learning_rate * share))
        run.seconds = time.monotonic() - started
        report(run.step * batch_tokens, f"loss {mean:.3f} nats")
        if run.step in checkpoints:
            record(run, config, accelerator, model, held_out, folder)
        late = broadcast_object_list([time.monotonic() - saved > config.state_every_seconds])[0]
        if run.step in checkpoints or late:
            save_state(accelerator, stream, folder, run.step)
            saved = time.monotonic()

    report.close()
    if accelerator.is_main_process:
        seconds = round(run.seconds, 1)
        speed = round(config.steps * batch_tokens / max(run.seconds, 1e-9))
        card = {
            "corpus": process.name,
            "parameters": parameters,
            "tokens": config.steps * batch_tokens,
        }
        card |= {"seconds": seconds, "tokens_per_second": speed, "device": str(accelerator.device)}
        card |= {"processes": accelerator.num_processes, "threads": torch.get_num_threads()}
        write_text(folder / CARD, json.dumps(card, indent=1))
        remove_states(folder)
    accelerator.wait_for_everyone()


def backward(accelerator, model, forward, parts):
    """Gradients of the mean loss over all of a step's `parts`, (rows, context) tokens each; processes meet at the last one.

    `forward` is the `model`, or what torch.compile made of it. Returns the loss, on the device.
    """
    total = 0
    for number, part in enumerate(parts, 1):
        with nullcontext() if number == len(parts) else accelerator.no_sync(model):
            share = len(part) / sum(map(len, parts))
            loss = (
                next_token_losses(forward(input_ids=part, use_cache=False).logits, part).mean()
                * share
            )
            accelerator.backward(loss)
        total = total + loss.detach()
    return total


@torch.no_grad()
def evaluate(model, tokens, rows):
    """`next_token_losses` on held-out `tokens`, `rows` sequences at a time, as float64 on the CPU."""
    model.eval()
    losses = [
        next_token_losses(model(input_ids=chunk, use_cache=False).logits, chunk).double().cpu()
        for chunk in tokens.split(rows)
    ]
    model.train()
    return torch.cat(losses)


def record(run, config, accelerator, model, held_out, folder):
    """Evaluate the model on held-out tokens, save it as a checkpoint and write all tables, in the main process."""
    if accelerator.is_main_process:
        unwrapped = accelerator.unwrap_model(model)
        losses = evaluate(unwrapped, held_out, config.batch_sequences)
        check_finite(losses.sum().item(), run.step, folder)
        means, tokens = losses.mean(1), run.step * config.batch_sequences * config.context
        run.held_out.append(
            (run.step, tokens, means.mean().item(), means.std().item() / len(means) ** 0.5)
        )
        run.by_position += [
            (run.step, position, loss) for position, loss in enumerate(losses.mean(0).tolist())
        ]
        save_checkpoint(unwrapped, folder, run.step)
        write_table(folder / "losses.csv", run.losses, "step tokens loss learning_rate")
        write_table(folder / "held_out.csv", run.held_out, "step tokens loss standard_error")
        write_table(folder / "held_out_by_position.csv", run.by_position, "step position loss")
    accelerator.wait_for_everyone()


def write_table(path, rows, columns):
    """Write tuples as a CSV file, whole or not at all; a float reads back as it was."""
    write_text(path, pd.DataFrame(rows, columns=columns.split()).to_csv(index=False))


def check_finite(loss, step, folder):
    """Raises ValueError if a loss, or whatever is added to it, is not finite."""
    if not math.isfinite(loss):
        raise ValueError(
            f"loss: not finite at step {step} in {folder}; give a lower learning rate or a longer warmup, and a new folder "
            f"(the checkpoints before it are kept)"
        )


def check_run(config, process, held_out, folder, device) -> dict:
    """The identity of a run: what is trained on what. ValueError if it cannot be trained, or not in `folder`."""
    check_sizes(vocabulary_size=process.vocabulary_size, end=process.end, **config.sizes())
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device = {device!r}: is not known; give auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda': torch sees no GPU here; give auto or cpu")
    shape = tuple(held_out.shape)
    if (
        len(shape) != 2
        or shape[0] < 2
        or shape[1] != config.context
        or held_out.is_floating_point()
    ):
        raise ValueError(
            f"held_out: is {held_out.dtype} {shape}; give whole numbers (sequences, context) with 2 sequences or more of "
            f"{config.context} tokens"
        )
    if not 0 <= held_out.min() <= held_out.max() < process.vocabulary_size:
        raise ValueError(
            f"held_out: has tokens from {held_out.min()} to {held_out.max()}; give ids below the vocabulary_size "
            f"{process.vocabulary_size} of {process.name}"
        )
    identity = {
        "corpus": process.name,
        "vocabulary_size": process.vocabulary_size,
        "end": process.end,
    }
    identity |= {
        "held_out": hashlib.sha256(held_out.cpu().long().numpy().tobytes()).hexdigest()[:16]
    }
    identity |= config.model_dump(exclude={"state_every_seconds", "compiled"})
    check_folder(folder, identity)
    if (folder / CARD).exists():
        read_json(folder / CARD, "remove it to train again")
        for table in TABLES:
            if not (folder / table).is_file():
                raise ValueError(
                    f"{folder}: is finished, but its {table} is gone; remove {CARD} to train again"
                )
    return identity
