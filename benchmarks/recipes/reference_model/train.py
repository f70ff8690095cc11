"""Train the reference MoE (``make reference-model DATA_DIR=...``, which also continues a stopped run).

``card.py`` turns the last checkpoint into the asset, ``save.py`` into a folder of the Hugging Face format.
"""

import random
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, Qwen2MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.recipes.reference_model.corpus import (
    DOMAINS,
    END_OF_TEXT,
    arithmetic_lines,
    load_documents,
    train_tokenizer,
)
from benchmarks.recipes.reference_model.fast_layers import linear_cross_entropy, routed_swiglu
from benchmarks.recipes.reference_model.muon import MuonAdamW
from moeq.kernels import compute_dtype as dtypes

ALL_EXPERTS_FUNCTIONS.register("routed_swiglu", routed_swiglu)
MIXTURE = {"prose": 0.42, "python": 0.30, "gsm8k": 0.13, "arithmetic": 0.15}
# What the families do not share: 16 narrow experts and a shared one, or 8 wide ones (renormalised router weights).
FAMILIES = {
    "qwen2_moe": partial(
        Qwen2MoeConfig, intermediate_size=512, moe_intermediate_size=128, shared_expert_intermediate_size=256,
        num_experts=16,
    ),
    "mixtral": partial(
        MixtralConfig, intermediate_size=256, num_local_experts=8, rms_norm_eps=1e-6, rope_theta=10_000.0
    ),
}  # fmt: skip


class Windows(Dataset[Tensor]):
    """Windows of the mixture; window i depends on (seed, i) only, so that a resumed run sees the same data."""

    def __init__(self, streams: dict[str, np.ndarray], tokenizer: Any, length: int, indices: range, seed: int) -> None:
        self.streams, self.tokenizer, self.length, self.indices, self.seed = streams, tokenizer, length, indices, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Tensor:
        index = self.indices[i]
        rng = np.random.default_rng((self.seed, index))
        # Stratified: consecutive windows walk evenly over the mixture, which keeps every batch near its proportions.
        position = (index * 0.6180339887498949) % 1.0
        bounds = np.cumsum([MIXTURE[domain] for domain in DOMAINS])
        domain = DOMAINS[min(int(np.searchsorted(bounds, position, side="right")), len(DOMAINS) - 1)]
        if domain == "arithmetic":
            lines = arithmetic_lines(random.Random(int(rng.integers(2**62))), self.length // 5)
            ids = self.tokenizer("\n".join(lines))["input_ids"][: self.length + 1]
            return torch.tensor(ids)
        start = int(rng.integers(len(self.streams[domain]) - self.length - 1))
        return torch.from_numpy(self.streams[domain][start : start + self.length + 1].astype(np.int64))


class Mixture(pl.LightningDataModule):
    """The training mixture: tokenizer and token streams are made once and kept in ``cache_dir``."""

    def __init__(
        self,
        data_dir: str,
        cache_dir: str,
        length: int = 512,
        batch_size: int = 8,
        vocab_size: int = 4096,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.cache = Path(cache_dir)

    def prepare_data(self) -> None:
        if (self.cache / "gsm8k.npy").exists():
            return
        documents = load_documents(Path(self.hparams["data_dir"]), self.hparams["seed"])
        tokenizer = train_tokenizer(documents, self.hparams["vocab_size"], self.hparams["seed"])
        tokenizer.save_pretrained(self.cache)
        for domain, texts in documents.items():
            encoded = tokenizer([text + END_OF_TEXT for text in texts])["input_ids"]
            np.save(self.cache / f"{domain}.npy", np.concatenate([np.array(ids, dtype=np.uint16) for ids in encoded]))

    def setup(self, stage: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.cache)
        self.streams = {d: np.load(self.cache / f"{d}.npy") for d in DOMAINS if d != "arithmetic"}

    def train_dataloader(self) -> DataLoader[Tensor]:
        """One epoch is ``limit_train_batches`` steps; epochs and ranks read disjoint windows."""
        assert self.trainer is not None
        per_rank = int(self.trainer.limit_train_batches or 1) * self.hparams["batch_size"]
        world, rank = self.trainer.world_size, self.trainer.global_rank
        first = self.trainer.current_epoch * per_rank * world
        indices = range(first + rank, first + per_rank * world, world)
        windows = Windows(self.streams, self.tokenizer, self.hparams["length"], indices, self.hparams["seed"])
        return DataLoader(windows, batch_size=self.hparams["batch_size"])


class ReferenceMoE(pl.LightningModule):
    """MoE of about 9M parameters with a load-balancing loss computed per block over the whole local batch."""

    def __init__(
        self,
        muon_lr: float = 0.02,
        adam_lr: float = 3e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 100,
        num_steps: int = 5000,
        balance: float = 0.01,
        num_experts_per_tok: int = 2,
        vocab_size: int = 4096,
        family: Literal["qwen2_moe", "mixtral"] = "qwen2_moe",
        compute_dtype: dtypes.ComputeDType = "auto",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.product_dtype = dtypes.compute_dtype(compute_dtype, torch.bfloat16)
        config = FAMILIES[family](
            vocab_size=vocab_size, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            num_experts_per_tok=num_experts_per_tok, tie_word_embeddings=True, max_position_embeddings=1024,
            bos_token_id=0, eos_token_id=0, pad_token_id=0, use_cache=False,
        )  # fmt: skip
        self.model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        self.model.set_experts_implementation("routed_swiglu")

    def on_fit_start(self) -> None:
        rank_zero_info(f"Products of the model and of Muon are in {str(self.product_dtype).removeprefix('torch.')}")

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.product_dtype == torch.bfloat16):
            out = self.model.model(ids[:, :-1], output_router_logits=True)
            hidden_TD = out.last_hidden_state.flatten(0, 1)
            loss = linear_cross_entropy(hidden_TD, self.model.lm_head.weight, ids[:, 1:].flatten())
        balance = torch.stack([balance_loss(x, self.hparams["num_experts_per_tok"]) for x in out.router_logits]).mean()
        self.log_dict({"train/loss": loss, "train/balance": balance}, prog_bar=True)
        return loss + self.hparams["balance"] * balance

    def configure_optimizers(self) -> Any:
        h = self.hparams
        groups: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
        for name, parameter in self.model.named_parameters():
            adam = parameter.ndim < 2 or any(part in name for part in ("embed", "mlp.gate.", "shared_expert_gate"))
            groups[0 if adam else 2 if name.endswith("gate_up_proj") else 1].append(parameter)
        lrs = {0: h["adam_lr"], 1: h["muon_lr"], 2: h["muon_lr"]}
        decays = {0: 0.0, 1: h["weight_decay"], 2: h["weight_decay"]}
        optimizer = MuonAdamW(
            ({"params": p, "lr": lrs[s], "weight_decay": decays[s], "num_splits": s} for s, p in groups.items()),
            self.product_dtype,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        """Linear warm-up, flat for the first third, then linear decay to zero."""
        total = self.hparams["num_steps"]
        return min(1.0, (step + 1) / self.hparams["warmup_steps"], max(0.0, (total - step) / (total * 2 / 3)))


def balance_loss(router_logits_TE: Tensor, top_k: int) -> Tensor:
    """Switch-Transformer load-balancing loss of one block: E * sum_e (share of slots)_e (mean probability)_e."""
    probabilities = router_logits_TE.float().softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k, dim=-1).indices, 1.0)
    return router_logits_TE.shape[-1] * (chosen.mean(0) / top_k * probabilities.mean(0)).sum()


if __name__ == "__main__":
    torch.set_num_threads(1)  # one process per core: no barrier between threads, so other work barely slows it
    LightningCLI(
        ReferenceMoE, Mixture, seed_everything_default=0, auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
    )  # fmt: skip
