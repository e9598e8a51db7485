"""The codebook process: one hidden code answers all cues of a sequence.

With few codes the code is inferred from any answers, and applied to any cue; with many, all that
helps is what this very cue was answered before. exact/codebook.py has the exact predictors.
"""

import torch

from latentree.data import counter
from latentree.data.corpus import Corpus, Documents, side_by_side


class Codebook(Corpus):
    """Sequences of segments, each a cue and its answer by the sequence's code.

    Codes and cues are drawn uniformly. The answer is what the code says of the cue, or with
    probability `noise` any answer, all alike. Tokens are the cues 0, 1, ... and after them the
    answers; there is no end token. code (codes, cues) is each code's answer (0, 1, ...) to each
    cue, from `seed`.
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
        latent = counter.below(len(self.code), counter.subkey(key, 0))
        latent = latent[:, None].expand_as(of_segment)
        cue = counter.below(self.cues, counter.subkey(of_segment, 0))
        other = counter.below(self.answers, counter.subkey(of_segment, 1))
        noisy = counter.happens(self.noise, counter.subkey(of_segment, 2))
        answer = torch.where(noisy, other, self.code.to(device)[latent, cue])
        latent = latent.repeat_interleave(2, 1)
        return side_by_side({"tokens": self.tokens(cue, answer), "latent": latent})

    def tokens(self, cue, answer) -> torch.Tensor:
        """Tokens (sequence, 2 segments) of cues and answers (sequence, segment)."""
        return torch.stack([cue, answer + self.cues], 2).flatten(1)

    def split(self, tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Cues and answers, (sequence, segment) each, of tokens (sequence, 2 segments)."""
        return tokens[:, ::2], tokens[:, 1::2] - self.cues
