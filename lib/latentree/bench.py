"""Speed on the machine at hand: python -m latentree.bench prints one Markdown table, medians of one run.

Ratios are between medians of this run; absolute numbers change with the machine and its other work.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import statistics
import time
from contextlib import contextmanager

import pandas as pd
import torch
from accelerate import Accelerator

from latentree import hydra
from latentree.corpus import Stream, load_process
from latentree.files import read_yaml
from latentree.induction import measure
from latentree.internals import Internals
from latentree.model import build_model, next_token_losses
from latentree.optimizers import build_optimizers
from latentree.resampling import stimulus
from latentree.stimuli import stimuli
from latentree.training import TrainingConfig


def seconds(work, repeats=7):
    """Median seconds of work(), after one call to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def corpus_speed(name):
    """Tokens per second of the stream on one core."""
    torch.set_num_threads(1)
    stream = Stream(load_process(name), 32, 128)
    return 50 * 32 * 128 / seconds(lambda: [stream.next_batch() for _ in range(50)])


def training_speed(name, settings, threads):
    """Seconds of a training step and of its batch from the stream, for the laptop's model."""
    torch.set_num_threads(threads)
    config, process = TrainingConfig(tokens=10**9, **settings), load_process(name)
    model = build_model(vocabulary_size=process.vocabulary_size, **config.sizes())
    model, *optimizers = Accelerator(cpu=True).prepare(model.train(), *build_optimizers(model, config))
    stream = Stream(process, config.batch_sequences, config.context)

    def step():
        next_token_losses(model(input_ids=batch, use_cache=False).logits, batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    batch = stream.next_batch()
    drawing = seconds(lambda: [stream.next_batch() for _ in range(50)]) / 50
    return seconds(step, 15), drawing, config.batch_sequences * config.context


def measuring_speed(settings):
    """Seconds to measure one checkpoint of the laptop's model for notebook 03, all scores on three stimuli."""
    process, config = load_process("bound"), TrainingConfig(**settings)
    model = build_model(vocabulary_size=process.vocabulary_size, **config.sizes())
    model.set_attn_implementation("eager")
    shown = stimuli(process, 128, config.context)
    return seconds(lambda: measure(model.eval(), shown), 3)


@contextmanager
def counted(model):
    """Counts what a model does inside the block: yields {"runs": forward passes, "tokens": positions computed in them}."""
    seen = {"runs": 0, "tokens": 0}

    def count(module, args, given):
        seen["runs"] += 1
        seen["tokens"] += (args[0] if args else given["input_ids"]).numel()

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def as_the_release_does(model, tokens, furthest):
    """For each sample, layer and m the clean run once more, and one with the stream after the layer m before set to 0."""
    blocks = Internals(model).blocks
    for row in tokens:
        for m in range(1, furthest + 1):
            for layer in range(m, len(blocks)):
                model(input_ids=row[None], output_hidden_states=True)
                hook = blocks[layer - m].register_forward_hook(lambda block, given, out: torch.zeros_like(out))
                model(input_ids=row[None], output_hidden_states=True)
                hook.remove()


@torch.no_grad()
def hydra_speed(settings, sequences=16, furthest=3):
    """Forward passes, token positions and seconds on one checkpoint: of notebook 05's layer ablations, of the release's way."""
    process, config = load_process("bound"), TrainingConfig(**settings)
    model = build_model(vocabulary_size=process.vocabulary_size, **config.sizes()).eval()
    shown, found = stimulus(process, sequences, config.context), []
    ways = (lambda: hydra.measure(model, shown, kinds=("layer",)), lambda: as_the_release_does(model, shown.tokens, furthest))
    for way in ways:
        with counted(model) as passes:
            way()
        found.append((passes["runs"], passes["tokens"], seconds(way, 3)))
    return found


def main():
    laptop = read_yaml("params/laptop/02_training.yaml")
    settings = {name: laptop[name] for name in ("layers", "width", "heads", "context", "batch_sequences", "optimizer")}
    cores, rows = os.cpu_count(), []
    for name in ("bound", "bound-flat", "released-small", "released", "bound-order3", "released-ngram"):
        rows.append((f"corpus stream, {name}, one core", f"{corpus_speed(name) / 1e6:.2f} M tokens/s"))
    for threads in (1, cores) if cores > 1 else (1,):
        step, drawing, tokens = training_speed("bound", settings, threads)
        rows.append((f"training step, laptop model, {threads} threads", f"{tokens / step:,.0f} tokens/s ({1000 * step:.0f} ms)"))
        rows.append((f"corpus stream's share of that step (limit 3 %), {threads} threads", f"{100 * drawing / step:.2f} %"))
    rows.append((f"induction scores of 20 checkpoints, {cores} threads", f"{20 * measuring_speed(settings):.0f} s"))
    for name, (runs, tokens, time_taken) in zip(("one run per ablated layer", "the release's protocol"), hydra_speed(settings)):
        rows.append((f"hydra, 16 sequences, m to 3, {name}", f"{runs} forward passes, {tokens:,} positions, {time_taken:.2f} s"))
    print(pd.DataFrame(rows, columns=["what", "median"]).to_markdown(index=False))


if __name__ == "__main__":
    main()
