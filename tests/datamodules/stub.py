"""The part of a Trainer and its module that datamodules read, for any rank."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from tests.tiny import tiny_tokenizer


@dataclass
class StubTrainer:
    run_dir: Path
    model: nn.Module | None = None
    global_rank: int = 0
    world_size: int = 1
    progress_bar_callback: Any = None
    logger: Any = None
    barriers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lightning_module = SimpleNamespace(model=self.model, tokenizer=tiny_tokenizer(), run_dir=self.run_dir)
        self.strategy = SimpleNamespace(barrier=self.barriers.append)

    @property
    def is_global_zero(self) -> bool:
        return self.global_rank == 0
