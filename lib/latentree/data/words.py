"""Words for tokens: documents that a person can read, and a tokenizer that other tools load."""

from importlib.resources import files

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

UNKNOWN = "[UNK]"


def words_of(sizes: dict) -> list[str]:
    """A word for each token of roles {name: size}, all different.

    They are English where words.txt has a list for the role that is long enough, less the words
    that roles before it took; else the role's name and a number.
    """
    lists = {}
    for line in files("latentree.data").joinpath("words.txt").read_text("utf-8").splitlines():
        names, words = line.split(":")
        for name in names.split():
            lists[name] = lists.get(name, []) + words.split()
    found = []
    for role, size in sizes.items():
        fresh = [word for word in lists.get(role, [role]) if word not in found]
        numbered = [f"{role}{number}" for number in range(size)]
        found += fresh[:size] if len(fresh) >= size else numbered
    return found


def tokenizer(words: list[str], end: int | None) -> PreTrainedTokenizerFast:
    """The tokenizer of text whose words stand between spaces; token i is `words[i]`.

    Any other word is the token after the last, which a model refuses: other tools try a tokenizer
    on words of their own before they load a model.
    """
    numbers = {word: number for number, word in enumerate([*words, UNKNOWN])}
    backend = Tokenizer(WordLevel(numbers, unk_token=UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()
    eos_token = None if end is None else words[end]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos_token)
