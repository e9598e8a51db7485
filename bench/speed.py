"""Speed on the machine at hand: python bench/speed.py prints one Markdown table, medians and ratios of one run.

Absolute numbers change with the machine and its other work. Every part runs in a process of its own, so that its threads and its
peak memory are its own.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec

import pandas as pd
import torch
from accelerate import Accelerator
from baselines import Lens, as_the_release_does, compiled_loop, nltk_tokens, trainer_step
from latentree.data.corpus import Stream, held_out, load_corpus
from latentree.data.files import read_yaml
from latentree.inside.attention import patterns
from latentree.inside.products import use_onednn
from latentree.measure import hydra
from latentree.measure.ablation import each_head
from latentree.measure.donors import stimulus
from latentree.measure.induction import measure
from latentree.measure.stimuli import stimuli
from latentree.train.model import build_model, next_token_losses
from latentree.train.optimizers import build_optimizers
from latentree.train.settings import TrainingConfig

SIZES = (
    "architecture layers width heads mlp_width context batch_sequences packing optimizer".split()
)
GIGA = 1e9


def seconds(work, repeats=5):
    """Median seconds of work(), after one call to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def alone(work, *given, threads=1):
    """work(*given) in a new process with so many threads: its result and the process's peak memory in GB."""
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,)
    ) as pool:
        return pool.submit(with_peak, work, *given).result()


def with_peak(work, *given):
    """work(*given), and the peak memory of this process in GB."""
    result = work(*given)
    unit = 1 if sys.platform == "darwin" else 1024
    return result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIGA


# ---------------------------------------------------------------------- what is timed


def corpus_speed(name):
    """Tokens per second of the stream."""
    stream = Stream(load_corpus(name), 32, 128)
    return 50 * 32 * 128 / seconds(lambda: [stream.next_batch() for _ in range(50)])


def nltk_speed(name):
    """Tokens per second of nltk's sampling."""
    grammar = load_corpus(name).grammar
    return len(nltk_tokens(grammar, 300)) / seconds(lambda: nltk_tokens(grammar, 300), 3)


def loop_speed():
    """Tokens per second of a compiled loop on the released grammar; none without a compiler."""
    loop = compiled_loop(load_corpus("released").grammar, 1_000_000)
    return loop and len(loop()) / seconds(loop)


def product_speed(rows=1024, inputs=1024, outputs=1024, onednn=True):
    """Floating-point operations per second of a linear map in float32, as models have it or torch's own."""
    linear = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias=False))
    linear, x = use_onednn(linear) if onednn else linear, torch.randn(rows, inputs)
    with torch.no_grad():
        took = seconds(lambda: [linear(x) for _ in range(20)])
    return 2 * rows * inputs * outputs * 20 / took


def flops_per_token(config, vocabulary):
    """Of a training step: 6 for each weight of a matrix product, and attention's 12 x layers x width x context / 2."""
    block = 4 * config.width**2 + 3 * config.width * config.mlp_width
    weights = config.layers * block + vocabulary * config.width
    return 6 * weights + 6 * config.layers * config.width * config.context


def training_step(settings, name, repeats):
    """Seconds of a step, of its optimizer alone, and of its batch from the stream; flops of a token."""
    config, process = TrainingConfig(tokens=10**9, **settings), load_corpus(name)
    model = build_model(vocabulary_size=process.vocabulary_size, **config.sizes())
    model, *optimizers = Accelerator(cpu=True).prepare(
        model.train(), *build_optimizers(model, config)
    )
    stream = Stream(process, config.batch_sequences, config.context)
    batch = stream.next_batch()

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        for optimizer in optimizers:
            optimizer.step()

    def step():
        model.zero_grad()
        next_token_losses(model(input_ids=batch, use_cache=False).logits, batch).mean().backward()
        update()

    whole, updating = seconds(step, repeats), seconds(update, repeats)
    drawing = seconds(lambda: [stream.next_batch() for _ in range(400)], 3) / 400
    return whole, updating, drawing, flops_per_token(config, process.vocabulary_size)


def trainers_step(settings, name, steps):
    """Seconds of a step of transformers' Trainer on the same model, fed from an Arrow file."""
    config, process = TrainingConfig(**settings), load_corpus(name)
    model = build_model(vocabulary_size=process.vocabulary_size, **config.sizes())
    tokens = Stream(process, 1, steps * config.batch_sequences * config.context).next_batch()[0]
    return trainer_step(model, tokens, config.context, config.batch_sequences, steps)


def measuring_speed(settings):
    """Seconds to measure one checkpoint of the laptop's model for notebook 03, all scores on three stimuli."""
    process, config = load_corpus("bound"), TrainingConfig(**settings)
    model = build_model(vocabulary_size=process.vocabulary_size, **config.sizes())
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


@torch.no_grad()
def hydra_speed(settings, sequences=64, furthest=3):
    """Forward passes, token positions and seconds on one checkpoint: of notebook 05's layer ablations, of the release's way."""
    process, config = load_corpus("bound"), TrainingConfig(**settings)
    model = build_model(vocabulary_size=process.vocabulary_size, **config.sizes()).eval()
    shown, found = stimulus(process, sequences, config.context), []
    ways = (
        lambda: hydra.measure(model, shown, kinds=("layer",)),
        lambda: as_the_release_does(model, shown.tokens, furthest),
    )
    for way, repeats in zip(ways, (3, 1)):
        with counted(model) as passes:
            way()
        found.append((passes["runs"], passes["tokens"], seconds(way, repeats)))
    return found


def peers_speed(settings, sequences=32):
    """Forward passes and seconds for the attention of all heads, and to switch off each: ours and TransformerLens's.

    None if TransformerLens is not installed. ValueError if the two do not agree.
    """
    if find_spec("transformer_lens") is None:
        return None
    process, config = load_corpus("bound"), TrainingConfig(**settings)
    model = build_model(vocabulary_size=process.vocabulary_size, **config.sizes()).eval()
    tokens = held_out(process, sequences, config.context)["tokens"]
    lens, everywhere = Lens(model, process), {"all": torch.ones_like(tokens[:, 1:], dtype=bool)}

    def ours():
        return each_head(model, tokens, everywhere)["value"].tolist()

    def theirs():
        return lens.each_head(tokens)

    apart = (patterns(model, tokens) - lens.patterns(tokens)).abs().max()
    if apart > 1e-4 or not torch.allclose(*map(torch.tensor, (ours(), theirs())), atol=1e-4):
        raise ValueError(f"TransformerLens and ours differ: attention by {apart:.1e}")
    found = {}
    for what, works in {
        "attention of all heads": (lambda: patterns(model, tokens), lambda: lens.patterns(tokens)),
        "each head switched off": (ours, theirs),
    }.items():
        for whose, work, counting in zip(
            ("ours", "theirs"), works, (model, lens.model.original_model)
        ):
            with counted(counting) as passes:
                work()
            found[what, whose] = passes["runs"], seconds(work, 3)
    return found


# ---------------------------------------------------------------------- the table


def corpus_rows():
    for name in ("bound", "released", "bound-order3", "released-ngram"):
        speed, _ = alone(corpus_speed, name)
        yield f"corpus stream, {name}, one core", f"{speed / 1e6:.2f} M tokens/s"
        if name in ("bound", "released"):
            yield (
                f"nltk's own sampling, {name}, one core (no latents)",
                told_beside(alone(nltk_speed, name)[0], speed),
            )
        if name == "released":
            loop, _ = alone(loop_speed)
            yield (
                "the release's algorithm as a loop in C, one core",
                "no compiler" if loop is None else told_beside(loop, speed),
            )


def told_beside(other, ours):
    """A speed and the ratio of ours to it."""
    return f"{other / 1e6:.2f} M tokens/s (ours: {ours / other:.2g} times)"


def product_rows(settings):
    sizes = settings["batch_sequences"] * settings["context"], settings["width"]
    sizes = *sizes, settings["mlp_width"]
    own, torchs = (alone(product_speed, *sizes, onednn)[0] for onednn in (True, False))
    yield (
        f"linear map of the laptop model, {' x '.join(map(str, sizes))}, one core",
        f"{own / GIGA:.0f} GFLOP/s by oneDNN; {torchs / GIGA:.0f} as torch does it by itself",
    )


def training_rows(model, settings, name, cores, repeats, steps):
    tokens, own, peaks = settings["batch_sequences"] * settings["context"], {}, {}
    for threads in sorted({1, cores}):
        peaks[threads], _ = alone(product_speed, threads=threads)
        (own[threads], updating, drawing, flops), memory = alone(
            training_step, settings, name, repeats, threads=threads
        )
        share = flops * tokens / own[threads] / peaks[threads]
        yield (
            f"training step, {model}, {threads} threads",
            f"{tokens / own[threads]:,.0f} tokens/s ({1000 * own[threads]:.0f} ms), {share:.0%} of the "
            f"matrix-product peak of {peaks[threads] / GIGA:.0f} GFLOP/s; {memory:.2f} GB",
        )
        yield (
            f"of that step, {threads} threads",
            f"the optimizer {updating / own[threads]:.1%}; "
            f"the corpus beside it {drawing / own[threads]:.2%}",
        )
    if cores > 1:
        yield f"{model}: {cores} threads over one", f"{own[1] / own[cores]:.2f} times"
    theirs, memory = alone(trainers_step, settings, name, steps, threads=cores)
    yield (
        f"transformers' Trainer (AdamW), {model}, {cores} threads",
        f"{tokens / theirs:,.0f} tokens/s (ours: {theirs / own[cores]:.2f} times); {memory:.2f} GB",
    )


def measuring_rows(settings, cores):
    took, memory = alone(measuring_speed, settings, threads=cores)
    yield (
        f"induction scores of one checkpoint, all heads, three stimuli, {cores} threads",
        f"{took:.2f} s; {memory:.2f} GB",
    )
    (ours, theirs), _ = alone(hydra_speed, settings, threads=cores)
    yield (
        "Hydra, 64 sequences, m to 3: one run per ablated layer",
        f"{ours[0]} forward passes, {ours[1]:,} positions, {ours[2]:.2f} s",
    )
    yield (
        "Hydra, the release's protocol",
        f"{theirs[0]} forward passes, {theirs[1]:,} positions, {theirs[2]:.2f} s "
        f"(ours: {theirs[0] / ours[0]:.0f} times fewer passes, {theirs[2] / ours[2]:.0f} times faster)",
    )


def peers_rows(settings, cores):
    found, _ = alone(peers_speed, settings, threads=cores)
    if found is None:
        yield "TransformerLens", "not installed: `.venv/bin/pip install transformer-lens`"
    for what in dict.fromkeys(what for what, _ in found or {}):
        (own, fast), (other, slow) = (found[what, whose] for whose in ("ours", "theirs"))
        yield (
            f"{what}, 32 sequences, {cores} threads",
            f"{own} forward passes, {1000 * fast:.0f} ms; TransformerLens {other}, {1000 * slow:.0f} ms "
            f"(ours: {slow / fast:.2f} times as fast), the same numbers",
        )


def main():
    cores = os.cpu_count()
    laptop, paper = (
        {
            name: value
            for name, value in read_yaml(f"params/{profile}/02_training.yaml").items()
            if name in SIZES
        }
        for profile in ("laptop", "paper")
    )
    paper |= {"batch_sequences": 4}  # of 64: a step of the whole batch takes half a minute on a CPU
    rows = [
        *corpus_rows(),
        *product_rows(laptop),
        *training_rows("laptop model", laptop, "bound", cores, 9, 14),
        *training_rows("paper's model, 4 sequences", paper, "released", cores, 2, 5),
        *measuring_rows(laptop, cores),
        *peers_rows(laptop, cores),
    ]
    print(pd.DataFrame(rows, columns=["what", "median"]).to_markdown(index=False))


if __name__ == "__main__":
    main()
