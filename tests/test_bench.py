"""What the speed is compared with does the work that it is said to do."""

import torch
from baselines import Rows, compiled_loop, nltk_tokens, trainer_step
from latentree.data.corpus import load_corpus
from latentree.exact.parser import legal_sentences
from latentree.train.model import build_model
from latentree.train.settings import TrainingConfig
from speed import SIZES, alone, flops_per_token, product_speed

torch.set_num_threads(1)


def test_nltk_and_the_compiled_loop_sample_the_released_grammar():
    grammar = load_corpus("released").grammar
    drawn = nltk_tokens(grammar, 200)
    assert legal_sentences(grammar, torch.tensor(drawn)) == [True] * 200
    loop = compiled_loop(grammar, 60_000)
    if loop is not None:
        tokens = torch.from_numpy(loop()).long()
        assert len(tokens) > 59_000 and all(legal_sentences(grammar, tokens))
        assert abs(len(tokens) / int((tokens == grammar.end).sum()) - 6) < 0.1  # tokens a sentence
        subjects = tokens[tokens < 300]
        document = torch.bincount(subjects[:2000], minlength=300)
        assert (
            document.max() > 3 * document.float().mean()
        )  # some words are frequent in the first documents ...
        assert torch.bincount(subjects, minlength=300).min() > 0  # ... and no word is never used


def test_the_trainer_reads_one_token_a_row_and_takes_time():
    table = {"token": list(range(100))}
    rows = Rows(_Table(table), 10)
    assert len(rows) == 10 and rows[3]["input_ids"].tolist() == list(range(30, 40))
    model = build_model("llama", 100, 1, 16, 2, 10)
    assert trainer_step(model, torch.arange(100).repeat(10), 10, 2, steps=4) > 0


class _Table:
    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["token"])

    def __getitem__(self, span):
        return {"token": self.columns["token"][span]}


def test_a_part_runs_alone_and_tells_its_memory():
    flops, memory = alone(product_speed, 128)
    assert flops > 1e8 and 0.05 < memory < 4


def test_flops_are_those_of_all_matrix_products():
    config = TrainingConfig(layers=2, width=16, heads=2, context=8, mlp_width=64)
    weights = 2 * (4 * 16 * 16 + 3 * 16 * 64) + 50 * 16
    assert flops_per_token(config, 50) == 6 * weights + 6 * 2 * 16 * 8
    assert "layers" in SIZES
