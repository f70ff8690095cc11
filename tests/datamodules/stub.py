"""The part of a Trainer and its module that datamodules read, for any rank."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from moeq.models.adapter import Adapter
from moeq.models.residency import Residency
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
    num_nodes: int = 1
    residency: Residency | None = None

    def __post_init__(self) -> None:
        self.lightning_module = module = SimpleNamespace(
            model=self.model, tokenizer=tiny_tokenizer(), run_dir=self.run_dir, run=SimpleNamespace(fallbacks=[])
        )
        if self.model is not None:
            # Files that tell it from other models; its weights are told by themselves.
            self.model.config.save_pretrained(self.run_dir / "model")
            module.hparams = {"name": str(self.run_dir / "model")}
            module.adapter = Adapter(self.model, self.residency)
        self.strategy = SimpleNamespace(barrier=self.barriers.append)

    @property
    def is_global_zero(self) -> bool:
        return self.global_rank == 0
