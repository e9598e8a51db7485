"""The settings of a training, checked."""

import math
from typing import Literal

from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

# What changes nothing of what is trained, or only its rounding.
TOLD_ONLY = {"state_every_seconds", "compiled", "trackers", "lines"}


class TrainingConfig(BaseModel, extra="forbid", frozen=True, strict=True, allow_inf_nan=False):
    """Everything that decides how a model is trained. ValueError for a setting that cannot be."""

    architecture: str = "llama"
    layers: PositiveInt = 2
    width: PositiveInt = 64  # of the residual stream
    heads: PositiveInt = 4
    mlp_width: NonNegativeInt = 128  # 0: attention only
    context: int = Field(128, ge=2)  # tokens a sequence
    batch_sequences: PositiveInt = 16  # sequences a step, over all processes
    packing: Literal["documents", "stream"] = "documents"  # where a window begins
    tokens: PositiveInt = 1_200_000  # trained on in all, rounded up to whole steps
    optimizer: Literal["adamw", "muon"] = "muon"
    learning_rate: PositiveFloat = 0.03  # AdamW's peak: Muon leaves it embeddings and gains
    muon_learning_rate: PositiveFloat = 0.007  # Muon's peak
    query_key_rate: PositiveFloat = 0.014  # Muon's peak for the matrices of queries and keys
    muon_momentum: float = Field(0.85, ge=0, lt=1)
    weight_decay: NonNegativeFloat = 0.0
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    warmup: float = Field(0.03, ge=0, lt=1)  # fraction of the steps
    decay: float = Field(0.6, ge=0, le=1)  # fraction of the steps, at the end
    gradient_clip: PositiveFloat = 1.0  # largest norm of the gradient
    # share of the places where an attention's output is missing in training, and what stands there
    resampled_attention: float = Field(0.0, ge=0, lt=1)
    resampled_from: Literal["another sequence", "zero"] = "another sequence"
    checkpoints_even: NonNegativeInt = 10
    checkpoints_log: NonNegativeInt = 10
    seed: int = Field(0, ge=0, lt=2**63)  # of the initial weights
    precision: Literal["float32", "bfloat16"] = "float32"  # of the runs; weights stay float32
    micro_batches: PositiveInt = 1  # parts that a step's sequences run in: less memory
    compiled: bool = False  # by torch.compile: faster on a GPU; changes rounding only
    state_every_seconds: NonNegativeFloat = 60.0  # so much is lost at most when killed
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []  # accelerate's, to watch from
    lines: dict[str, float] = {}  # losses in nats that they show as constants

    @property
    def step_tokens(self) -> int:
        """Tokens in a step."""
        return self.batch_sequences * self.context

    @property
    def steps(self) -> int:
        """Optimizer steps in the whole training."""
        return math.ceil(self.tokens / self.step_tokens)

    def sizes(self) -> dict:
        """The arguments of `build_model` that are settings here."""
        names = {"architecture", "layers", "width", "heads", "context", "mlp_width"}
        return self.model_dump(include=names)
