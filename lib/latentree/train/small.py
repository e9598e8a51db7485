"""A training of seconds in memory, for processes that give tokens and are no corpus."""

from tqdm.auto import tqdm

from latentree.train.model import next_token_losses
from latentree.train.optimizers import build_optimizers, rate_share
from latentree.train.settings import TrainingConfig


def fit(model, draw, steps: int, rate: float = 0.01, look=None, every: int = 1, name: str = ""):
    """Train a model in place on what `draw()` gives, tokens (sequence, position), step after step.

    The recipe is a corpus's (Muon and AdamW, its schedule), with one peak `rate` for all matrices.
    Returns what `look()` gave before the first step, after each `every` steps, and at the end; an
    empty list without a `look`. Nothing is written to disk; `name` stands before the bar.
    ValueError for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps = {steps}: give at least 1")
    config = TrainingConfig(learning_rate=rate, muon_learning_rate=rate, query_key_rate=rate)
    optimizers, seen = build_optimizers(model, config), []
    for step in tqdm(range(steps), desc=name):
        if look and step % every == 0:
            seen.append(look())
        tokens = draw()
        model.zero_grad()
        next_token_losses(model(input_ids=tokens).logits, tokens).mean().backward()
        share = rate_share(step, steps, config.warmup, config.decay)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            optimizer.step()
    return [*seen, look()] if look else []
