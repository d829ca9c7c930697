"""What the parts of a run share."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from barlow_loss import CollapseReport
from barlow_recipes import checkpoint
from barlow_recipes.checkpoint import TrainingState
from barlow_recipes.data import PretrainingData
from barlow_recipes.metrics import Metrics
from barlow_recipes.outputs import CHECKPOINT
from barlow_recipes.settings import Settings
from barlow_recipes.timing import Stopwatch

Accuracies = dict[str, dict[str, float]]  # of each representation, in percent


@dataclass
class Run:
    """One run of the program, on this process."""

    settings: Settings
    data: PretrainingData
    state: TrainingState
    out: Path
    metrics: Metrics
    watch: Stopwatch
    network: nn.Module  # the model as it is trained: synchronised, compiled
    begun: str | None = None  # in words, where the weights came from that were not random
    buffers_before: list[Tensor] = field(default_factory=list)  # the model's, as they were before the step
    watched: Accuracies = field(default_factory=dict)  # the monitor's, without pretraining
    accuracies: Accuracies = field(default_factory=dict)  # and the newest, beside them
    before: Tensor | None = None  # the cross-correlation of the initial weights
    collapse: CollapseReport | None = None  # the newest, on the embeddings of the first pairs

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data.pairs) // self.settings.accumulate

    @property
    def last_step(self) -> int:
        return min(self.settings.epochs * self.steps_per_epoch, self.settings.limit_steps or sys.maxsize)

    @property
    def checkpoint(self) -> Path:
        return self.out / CHECKPOINT

    def shaping(self) -> dict[str, object]:
        """The settings and data that a continued run must share with its checkpoint."""
        return self.settings.shaping() | {"images": self.data.images}

    def save(self) -> None:
        content = self.state.state_dict() | {"settings": self.shaping()}
        checkpoint.save(self.checkpoint, content, keep_previous=True)

    def tell(self, text: str) -> None:
        """Note something that is not as it should be."""
        self.metrics.add("event", {"step": self.state.step, "text": text})
