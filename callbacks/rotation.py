"""Rotate the model before it is calibrated: the same function of the tokens, without outliers in its weights."""

import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from moeq.callback import Step, module_of
from moeq.models.rotation import RotationSpec, rotate


class Rotation(Step):
    """Absorbs norms and rotates residual stream and values of heads (MoEQuant++); put it first in the list.

    Args:
        **settings: Those of ``RotationSpec``.
    """

    def __init__(self, **settings: Any) -> None:
        self.spec = RotationSpec(**settings)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before anything is sampled, surveyed or calibrated; a resumed run rotates its model again, alike."""
        module = module_of(pl_module)
        start = time.perf_counter()
        model = module.model
        module.adapter.residency.place(module.device)
        vocabulary = model.config.get_text_config().vocab_size
        probe = torch.randint(0, vocabulary, (2, 32), generator=torch.Generator().manual_seed(0))
        module.run.fallbacks += rotate(module.adapter, probe.to(module.device), self.spec)
        module.run.reasons["*"] = f"rotated ({self.spec.kind})"
        module.run.seconds["rotation"] = time.perf_counter() - start
        rank_zero_info(f"Rotation: {self.spec.kind} of size {model.get_input_embeddings().weight.shape[-1]}")
