"""Training a small causal model on a corpus: one loop, exact resume, checkpoints, losses."""

import json
import math
import os
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace

import pandas as pd
import torch
from accelerate.utils import broadcast_object_list, gather_object

from latentree.data.corpus import Stream
from latentree.data.files import locked, write_text
from latentree.data.words import tokenizer
from latentree.inside.names import Internals
from latentree.series.checkpoints import (
    CARD,
    IDENTITY,
    checkpoint_steps,
    read_identity,
    save_checkpoint,
)
from latentree.series.sweep import digest
from latentree.train.model import build_model, next_token_losses
from latentree.train.optimizers import build_optimizers, rate_share
from latentree.train.processes import Bar, accelerator_of, trackers_of
from latentree.train.settings import TOLD_ONLY, TrainingConfig

STATE = "state.pt"  # where an interrupted training goes on


def train(config, corpus, held_out, folder, device="auto", tell=None) -> pd.DataFrame:
    """Train a model on `corpus` in `folder`; interrupted and started again, it goes on exactly.

    `held_out` is (sequences, context) tokens; `device` is auto, cpu or cuda; `tell(tokens)` is
    called after each step, by default to draw a bar.

    Returns losses.csv: step, tokens, loss (nats a token, the mean since the row before) and
    learning_rate. The folder also gets held_out.csv (step, tokens, loss, standard_error over
    sequences), the checkpoints step-*, and run_card.json. A finished training is not repeated.

    ValueError if the settings do not fit together, if `folder` holds another training, or if a loss
    is not finite; the last good checkpoint and state stay.
    """
    folder = Path(folder)
    identity = check_run(config, corpus, held_out, folder)
    if (folder / CARD).exists():
        (folder / STATE).unlink(missing_ok=True)
        return pd.read_csv(folder / "losses.csv")
    accelerator = accelerator_of(config, device, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = locked(folder.with_name(f".{folder.name}.lock"), 5)
    with lock if accelerator.is_main_process else nullcontext():
        _loop(config, corpus, held_out, folder, identity, accelerator, tell)
    return pd.read_csv(folder / "losses.csv")


def check_run(config, corpus, held_out, folder) -> dict:
    """The identity of a run: what is trained on what. ValueError if `folder` holds another run."""
    length = held_out.shape[1]
    if length != config.context:
        raise ValueError(f"held_out: has {length} tokens a sequence; context is {config.context}")
    for name in config.trackers:
        if find_spec(name) is None:
            mend = f"`pip install {name}`, or leave it out"
            raise ValueError(f"trackers: {name} is not installed; {mend}")
    identity = {"corpus": corpus.name, "grammar": corpus.digest, "held_out": digest(held_out)}
    identity |= {"corpus_seed": corpus.seed} if corpus.seed else {}  # 0 is not said
    identity |= config.model_dump(exclude=TOLD_ONLY)
    there = identity
    if (folder / IDENTITY).exists():  # of a setting that came later, a run has the default
        there = TrainingConfig().model_dump(exclude=TOLD_ONLY) | read_identity(folder)
    other = [name for name in identity | there if there.get(name) != identity.get(name)]
    if other:
        told = ", ".join(other)
        raise ValueError(f"{folder}: holds a training with other {told}; name a new folder")
    return identity


def _loop(config, corpus, held_out, folder, identity, accelerator, tell):
    """The training itself, from the latest state in `folder` if there is one."""
    device, sequences = accelerator.device, config.batch_sequences
    rows, left = divmod(sequences, accelerator.num_processes)
    if left:
        raise ValueError(
            f"batch_sequences = {sequences}: does not divide over {accelerator.num_processes} "
            "processes; give a multiple of them"
        )
    first = rows * accelerator.process_index
    stream = Stream(corpus, rows, config.context, device, config.packing, first, sequences)
    words = {"vocabulary_size": corpus.vocabulary_size, "end": corpus.end}
    model = build_model(**config.sizes(), **words, seed=config.seed)
    parameters = model.num_parameters()
    noise = _resample_attention(model, config, device)
    model, *optimizers = accelerator.prepare(model.train(), *build_optimizers(model, config))
    forward = model
    if config.compiled:
        torch.compiler.reset()  # after some models in a process torch compiles no more
        # On a GPU the many small kernels are started as one graph, whose gradients live only until
        # it runs again: not where they are summed over parts.
        mode = "reduce-overhead" if config.micro_batches == 1 else "default"
        forward = torch.compile(model, mode=mode)
    held_out = held_out.to(device)
    run = SimpleNamespace(step=0, seconds=0.0, losses=[], held_out=[])
    _load_state(accelerator, folder, model, optimizers, stream, run)

    checkpoints = checkpoint_steps(config.steps, config.checkpoints_even, config.checkpoints_log)
    log_every = max(1, config.steps // 500)  # losses.csv has about 500 rows
    window = []
    started, saved = time.monotonic() - run.seconds, time.monotonic()
    total = config.steps * config.step_tokens
    if tell is None:
        hidden = not accelerator.is_main_process
        tell = Bar(desc=corpus.name, total=total, disable=hidden).update
    tell(run.step * config.step_tokens)
    if run.step == 0 and accelerator.is_main_process:  # all that could have failed is made by now
        folder.mkdir(exist_ok=True)
        write_text(folder / IDENTITY, json.dumps(identity, indent=1))
    if config.trackers:
        with trackers_of(accelerator):
            accelerator.init_trackers("latentree", identity)
    if run.step == 0:
        _record(run, config, accelerator, model, held_out, folder, corpus)

    while run.step < config.steps:
        share = rate_share(run.step, config.steps, config.warmup, config.decay)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
        noise.manual_seed((config.seed * 2**32 + run.step) % 2**63)
        parts = stream.next_batch().chunk(config.micro_batches)
        loss = _backward(accelerator, model, forward, parts)
        norm = accelerator.clip_grad_norm_(model.parameters(), config.gradient_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.step += 1
        window.append(loss)
        tell(config.step_tokens)
        if run.step % log_every and run.step not in checkpoints:
            continue

        mean = accelerator.reduce(torch.stack(window).mean(), "mean").item()
        window = []
        # A gradient that is not finite has just spoilt the weights, before any loss shows it.
        _check_finite(mean + float(norm), run.step, folder)
        tokens = run.step * config.step_tokens
        rate, run.seconds = config.learning_rate * share, time.monotonic() - started
        run.losses.append((run.step, tokens, mean, rate))
        told = {"loss": mean, "learning_rate": rate, "tokens": tokens} | config.lines
        told["tokens_per_second"] = tokens / run.seconds
        with trackers_of(accelerator):
            accelerator.log(told, step=run.step)
        if run.step in checkpoints:
            _record(run, config, accelerator, model, held_out, folder, corpus)
        late = broadcast_object_list([time.monotonic() - saved > config.state_every_seconds])[0]
        if run.step in checkpoints or late:
            _save_state(accelerator, folder, model, optimizers, stream, run)
            saved = time.monotonic()

    with trackers_of(accelerator):
        for tracker in accelerator.trackers:
            tracker.finish()
    if accelerator.is_main_process:
        card = {
            "corpus": corpus.name,
            "parameters": parameters,
            "tokens": total,
            "seconds": round(run.seconds, 1),
            "tokens_per_second": round(total / max(run.seconds, 1e-9)),
            "device": str(device),
            "processes": accelerator.num_processes,
            "threads": torch.get_num_threads(),
        }
        write_text(folder / CARD, json.dumps(card, indent=1))
        (folder / STATE).unlink(missing_ok=True)
    accelerator.wait_for_everyone()


def _resample_attention(model, config, device) -> torch.Generator:
    """Let attentions give another sequence's output, or 0, at some places of the training.

    Later parts then learn to do without. Returns what draws the places.
    """
    noise = torch.Generator(device)

    def resample(module, inputs, output):
        if module.training:
            drawn = torch.rand(output.shape[:2], generator=noise, device=output.device)
            instead = output.roll(1, 0) * (config.resampled_from == "another sequence")
            return torch.where(drawn[..., None] < config.resampled_attention, instead, output)

    if config.resampled_attention:
        inside = Internals(model)
        for layer in range(inside.layers):
            inside.attention_written(layer).register_forward_hook(resample)
    return noise


def _backward(accelerator, model, forward, parts):
    """Gradients of the mean loss over a step's `parts`, (rows, context) tokens each; the loss.

    Processes meet at the last part. `forward` is the `model`, or what torch.compile made of it.
    """
    total = 0
    for number, part in enumerate(parts, 1):
        with nullcontext() if number == len(parts) else accelerator.no_sync(model):
            share = len(part) / sum(map(len, parts))
            logits = forward(input_ids=part, use_cache=False).logits
            loss = next_token_losses(logits, part).mean() * share
            accelerator.backward(loss)
        total = total + loss.detach()
    return total


def _record(run, config, accelerator, model, held_out, folder, corpus):
    """Evaluate the model on held-out tokens, save it as a checkpoint, and write both tables."""
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(model)
        losses = evaluate(model, held_out, config.batch_sequences)
        model.train()
        _check_finite(losses.sum().item(), run.step, folder)
        means, tokens = losses.mean(1), run.step * config.step_tokens
        error = means.std().item() / len(means) ** 0.5
        run.held_out.append((run.step, tokens, means.mean().item(), error))
        with trackers_of(accelerator):
            accelerator.log({"held_out_loss": means.mean().item()}, step=run.step)
        save_checkpoint(model, folder, run.step, tokenizer(corpus.words, corpus.end))
        _write_table(folder / "losses.csv", run.losses, "step tokens loss learning_rate")
        _write_table(folder / "held_out.csv", run.held_out, "step tokens loss standard_error")
    accelerator.wait_for_everyone()


@torch.no_grad()
def evaluate(model, tokens, rows: int = 64) -> torch.Tensor:
    """Losses in nats of predicting each next token of `tokens` (sequences, context), on the CPU.

    They are (sequences, context - 1) in float64; `rows` sequences are run at a time.
    """
    model.eval()
    losses = []
    for part in tokens.to(model.device).split(rows):
        logits = model(input_ids=part, use_cache=False).logits
        losses.append(next_token_losses(logits, part).double().cpu())
    return torch.cat(losses)


def _write_table(path, rows, columns):
    """Write tuples as a CSV file, whole or not at all; a float reads back as it was."""
    write_text(path, pd.DataFrame(rows, columns=columns.split()).to_csv(index=False))


def _check_finite(loss, step, folder):
    """ValueError if a loss, or whatever is added to it, is not finite."""
    if not math.isfinite(loss):
        raise ValueError(
            f"loss: not finite at step {step} in {folder}; give a lower learning rate or a longer "
            "warmup, and a new folder (the checkpoints before it are kept)"
        )


def _save_state(accelerator, folder: Path, model, optimizers, stream, run) -> None:
    """Keep all that the loop needs to go on exactly, in one file: whole or not at all."""
    streams = gather_object([stream.state_dict()])
    if accelerator.is_main_process:
        state = {
            "model": accelerator.unwrap_model(model).state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "streams": streams,
            "run": vars(run),
        }
        partial = folder / f".{STATE}.tmp"
        torch.save(state, partial)
        os.replace(partial, folder / STATE)
    accelerator.wait_for_everyone()


def _load_state(accelerator, folder: Path, model, optimizers, stream, run) -> None:
    """Go on from the state in `folder`, if there is one, in as many processes as saved it."""
    if (folder / STATE).exists():
        try:
            state = torch.load(folder / STATE, map_location="cpu")
        except (EOFError, RuntimeError, UnpicklingError) as error:
            told = f"{folder / STATE}: cannot be read: {error!r:.99}"
            raise ValueError(f"{told}; if it is damaged, move it elsewhere to begin anew") from None
        accelerator.unwrap_model(model).load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        stream.load_state_dict(state["streams"][accelerator.process_index])
        vars(run).update(state["run"])
