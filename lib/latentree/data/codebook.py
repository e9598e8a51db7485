"""The codebook process: one hidden code answers all cues of a sequence.

The number of codes is a dial. With few, the code itself is inferred from any answers, and applied
to any cue; with many, all that helps is what this very cue was answered before. exact/codebook.py
has its exact predictors.
"""

import torch

from latentree.data import counter
from latentree.data.corpus import Corpus, Documents, side_by_side


class Codebook(Corpus):
    """Sequences of segments, each a cue and its answer by the sequence's code.

    A sequence draws one of the codes, all alike, and each segment a cue, all alike. The answer is
    what the code says of the cue, or with probability `noise` any answer, all alike. Tokens are the
    cues 0, 1, ... and after them the answers. There is no end token.

    Attributes beside a corpus's: code (codes, cues), the answer that each code gives to each cue
    (0, 1, ...), which follows from `seed`; cues, answers, segments (numbers) and noise.
    """

    def __init__(self, codes=8, cues=16, answers=4, segments=32, noise=0.25, seed=0):
        self.cues, self.answers, self.segments, self.noise = cues, answers, segments, noise
        name, label = f"codebook-{codes}", f"codebook, {codes} codes"
        content = ["codebook", codes, cues, answers, segments, noise]
        size = cues + answers
        super().__init__(name, "codebook", size, None, 2 * segments, content, seed, label)
        draw = torch.Generator().manual_seed(seed)
        self.code = torch.randint(answers, (codes, cues), generator=draw)

    def documents(self, ids, device="cpu", detail=True) -> Documents:
        """Sequences by number; field latent is the number of the code."""
        key = self._keys(ids, device)
        segment = torch.arange(self.segments, device=device)
        of_segment = counter.subkey(key[:, None], 1 + segment)

        def drawn(keys, number, count):
            return counter.below(count, counter.subkey(keys, number))

        latent = drawn(key, 0, len(self.code))[:, None].expand_as(of_segment)
        cue, other = drawn(of_segment, 0, self.cues), drawn(of_segment, 1, self.answers)
        noisy = counter.happens(self.noise, counter.subkey(of_segment, 2))
        answer = torch.where(noisy, other, self.code.to(device)[latent, cue])
        latents = latent.repeat_interleave(2, 1)
        return side_by_side({"tokens": self.tokens(cue, answer), "latent": latents})

    def tokens(self, cue, answer) -> torch.Tensor:
        """Tokens (sequence, 2 segments) of cues and answers (sequence, segment)."""
        return torch.stack([cue, answer + self.cues], 2).flatten(1)

    def split(self, tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Cues and answers, (sequence, segment) each, of tokens (sequence, 2 segments)."""
        return tokens[:, ::2], tokens[:, 1::2] - self.cues
