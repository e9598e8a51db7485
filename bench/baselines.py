"""What the library's speed is compared with: nltk's sampling, a compiled loop, transformers' Trainer, the release's protocol,
TransformerLens.

The release's ways are written here from their description, as fast as they allow.
"""

import ctypes
import shutil
import subprocess
import tempfile
import time
from itertools import pairwise, product
from pathlib import Path

import nltk
import numpy as np
import torch
from latentree.data.grammar import Grammar
from latentree.data.words import tokenizer
from latentree.inside.names import Internals
from latentree.train.model import next_token_losses
from transformers import Trainer, TrainerCallback, TrainingArguments


def nltk_tokens(grammar: Grammar, sentences: int, seed: int = 0) -> list[int]:
    """Tokens of sentences drawn one by one with nltk's own distributions: one for each nonterminal, one for each role's words.

    No latents are drawn: it is less work than the grammar asks for.
    """
    rng, rules = np.random.default_rng(seed), {}
    nltk.probability.random.seed(seed)
    for rule in nltk.PCFG.fromstring(grammar.file.sentence).productions():
        rules.setdefault(rule.lhs(), {})[rule.rhs()] = rule.prob()
    start, drawn = next(iter(rules)), []
    rules = {left: nltk.DictionaryProbDist(table) for left, table in rules.items()}
    words = {
        role: nltk.DictionaryProbDist(
            dict(zip(rng.permutation(grammar.words[i]).tolist(), grammar.frequencies[i].tolist()))
        )
        for i, role in enumerate(grammar.roles[:-1])
    }

    def expand(symbol):
        if isinstance(symbol, str):
            drawn.append(words[symbol].generate())
        else:
            for part in rules[symbol].generate():
                expand(part)

    for _ in range(sentences):
        expand(start)
        drawn.append(grammar.end)
    return drawn


RELEASED_LOOP = r"""
#include <stdint.h>
static uint64_t state;
static double uniform() { state ^= state << 13; state ^= state >> 7; state ^= state << 17; return (state >> 11) / 9007199254740992.0; }
static int ranked(const double *limit, int size) {
    double u = uniform(); int low = 0, high = size - 1;
    while (low < high) { int middle = (low + high) / 2; if (limit[middle] > u) high = middle; else low = middle + 1; }
    return low;
}
/* documents of the released grammar: 3 roles of `size` words by Zipf's law `limit` through a shuffled map each, `links` connectors */
long sample(int32_t *out, long most, const double *limit, int size, int links, int sentences, int repetitions, uint64_t seed) {
    int32_t map[3][4096]; long n = 0, document = 0; state = seed * 2 + 1;
    while (n + sentences * 12 <= most) {
        if (document++ % repetitions == 0)
            for (int role = 0; role < 3; role++) {
                for (int i = 0; i < size; i++) map[role][i] = role * size + i;
                for (int i = size - 1; i > 0; i--) { int j = (int)(uniform() * (i + 1)); int32_t t = map[role][i]; map[role][i] = map[role][j]; map[role][j] = t; }
            }
        for (int s = 0; s < sentences; s++) {
            if (uniform() < 0.5) {
                out[n++] = map[1][ranked(limit, size)]; out[n++] = map[0][ranked(limit, size)]; out[n++] = map[2][ranked(limit, size)];
            } else {
                int clauses = 1 + (int)(uniform() * 3);
                for (int c = 0; c < clauses; c++) {
                    if (c) out[n++] = 3 * size + (int)(uniform() * links);
                    for (int role = 0; role < 3; role++) out[n++] = map[role][ranked(limit, size)];
                }
            }
            out[n++] = 3 * size + links;
        }
    }
    return n;
}
"""


def compiled_loop(grammar: Grammar, tokens: int):
    """A function () -> about so many `tokens` of the released grammar, sampled by a loop in C. None without a compiler."""
    if not (compiler := shutil.which("cc")):
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "loop.c", Path(folder) / "loop.so"
        source.write_text(RELEASED_LOOP)
        subprocess.run(
            [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library), str(source)],
            check=True,
        )
        loop = ctypes.CDLL(str(library)).sample
    loop.restype, loop.argtypes = (
        ctypes.c_long,
        [ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p, *[ctypes.c_int] * 4, ctypes.c_uint64],
    )
    out, limit = np.empty(tokens, dtype=np.int32), np.cumsum(grammar.frequencies[0])
    sizes = (
        int(grammar.sizes[0]),
        int(grammar.sizes[-2]),
        grammar.file.document.per_document("sentence"),
        grammar.file.repetitions,
    )
    return lambda: out[: loop(out.ctypes.data, tokens, limit.ctypes.data, *sizes, 1)]


class Rows(torch.utils.data.Dataset):
    """Windows of an Arrow table with one token in each row, as the release stores its corpus."""

    def __init__(self, table, context):
        self.table, self.context = table, context

    def __len__(self):
        return len(self.table) // self.context

    def __getitem__(self, window):
        tokens = torch.tensor(
            self.table[window * self.context : (window + 1) * self.context]["token"]
        )
        return {"input_ids": tokens, "labels": tokens}


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *_, **__):
        self.ends.append(time.perf_counter())


def trainer_step(model, tokens, context: int, rows: int, steps: int = 12) -> float:
    """Median seconds of a step of transformers' Trainer (AdamW) fed from an Arrow file; `tokens` (count,) are its text."""
    import datasets

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        datasets.Dataset.from_dict({"token": tokens.tolist()}).save_to_disk(f"{folder}/arrow")
        table = datasets.load_from_disk(f"{folder}/arrow")
        settings = TrainingArguments(
            f"{folder}/out",
            per_device_train_batch_size=rows,
            max_steps=steps,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model, settings, train_dataset=Rows(table, context), callbacks=[clock]).train()
    return float(np.median([end - begin for begin, end in pairwise(clock.ends[1:])]))


def as_the_release_does(model, tokens, furthest: int) -> None:
    """The release's Hydra protocol: for each sample, layer and m a clean run, and one with the stream after the layer m before set to 0."""
    blocks = Internals(model).blocks
    for row in tokens:
        for m in range(1, furthest + 1):
            for layer in range(m, len(blocks)):
                model(input_ids=row[None], output_hidden_states=True)
                hook = blocks[layer - m].register_forward_hook(
                    lambda block, given, out: torch.zeros_like(out)
                )
                model(input_ids=row[None], output_hidden_states=True)
                hook.remove()


class Lens:
    """What TransformerLens 4 computes of one of our models, in the order and units of ours."""

    def __init__(self, model, corpus):
        from transformer_lens.model_bridge import TransformerBridge

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tokenizer(corpus.words, corpus.end).save_pretrained(folder)
            self.model = TransformerBridge.boot_transformers(folder, device="cpu")
        self.layers, self.heads = model.config.num_hidden_layers, model.config.num_attention_heads

    @torch.no_grad()
    def patterns(self, tokens):
        """Attention (layer, batch, head, query, key)."""
        names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(self.layers)]
        _, cache = self.model.run_with_cache(tokens, names_filter=names)
        return torch.stack([cache[name] for name in names])

    @torch.no_grad()
    def each_head(self, tokens):
        """Rise of the mean loss (nats) without each head, one at a time, its z replaced by its mean."""
        names = [f"blocks.{layer}.attn.hook_z" for layer in range(self.layers)]
        logits, cache = self.model.run_with_cache(tokens, names_filter=names)
        clean, found = next_token_losses(logits, tokens).mean(), []
        for name, head in product(names, range(self.heads)):
            mean = cache[name].mean((0, 1))

            def switch_off(z, hook, mean=mean, head=head):
                z[..., head, :] = mean[head]
                return z

            logits = self.model.run_with_hooks(tokens, fwd_hooks=[(name, switch_off)])
            found.append(float(next_token_losses(logits, tokens).mean() - clean))
        return found
