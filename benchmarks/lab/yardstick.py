"""The yardstick of the studies: divergence of a model from the original on texts of several domains.

Logits and routing of the original are computed once and kept.

Legend: N windows, L tokens of a window, V vocabulary.
"""

from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeq.checkpoint.loading import load_model, load_tokenizer
from moeq.disk.texts import read_documents, token_stream
from moeq.models.adapter import Adapter, Site
from moeq.models.observe import observe
from moeq.quant.hessian import accumulate, empty_state, mean_hessian
from moeq.scoring.divergence import kl_sum_and_agreement
from moeq.scoring.perplexity import nll_sum_and_count
from moeq.scoring.routing import count_same_routing, record_routing
from moeq.tasks.windows import consecutive_windows, spread

BATCH = 8


@dataclass(frozen=True)
class Divergence:
    """How far a model is from the original on one domain: nats, nats per token of the text, shares."""

    kl: float
    nll: float
    top1_agreement: float
    router_agreement: float


@dataclass(frozen=True)
class Texts:
    """What a yardstick measures on: file of each domain, tokens of a window, windows per domain (evenly spread)."""

    data_dir: str = "assets/reference-moe/texts"
    domains: dict[str, str] = field(
        default_factory=lambda: {
            "prose": "wikitext2_test.txt", "python": "python_heldout.jsonl",
            "gsm8k": "gsm8k_test.jsonl", "arithmetic": "arithmetic.txt",
        }
    )  # fmt: skip
    window_length: int = 256
    num_windows: int | None = 32


class Yardstick:
    """Evaluation windows of the domains with the original's logits.

    Args:
        name: The original model.
        texts: Domains and windows; None is those of ``configs/eval.yaml`` on the bundled model.
    """

    def __init__(self, name: str, texts: Texts | None = None) -> None:
        self.texts = texts or Texts()
        self.model, self.tokenizer = load_model(name, "auto", "auto"), load_tokenizer(name)
        self.streams = {
            domain: token_stream(read_documents(Path(self.texts.data_dir) / file), self.tokenizer)
            for domain, file in self.texts.domains.items()
        }
        self._original = {domain: list(map(self._run_original, self._batches(domain))) for domain in self.streams}

    def windows(self, domain: str) -> Tensor:
        """The evaluation windows of a domain, [N, L]."""
        every_NL = consecutive_windows(self.streams[domain], self.texts.window_length)
        return every_NL[spread(len(every_NL), self.texts.num_windows)]

    def unused_windows(self, domain: str) -> Tensor:
        """The windows of a domain that are not evaluated, [N, L]: what an oracle may calibrate on."""
        every_NL = consecutive_windows(self.streams[domain], self.texts.window_length)
        num = self.texts.num_windows or len(every_NL)
        unused_N = torch.ones(len(every_NL), dtype=torch.bool)
        unused_N[torch.arange(num) * len(every_NL) // num] = False
        return every_NL[unused_N]

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, Divergence]:
        """Divergence of a model by domain."""
        return {domain: self._measure(model, domain) for domain in self.streams}

    def row(self, model: Any) -> dict[str, dict[str, float]]:
        """The same as plain data, for the ``domains`` of a row."""
        return {domain: asdict(divergence) for domain, divergence in self.measure(model).items()}

    @torch.no_grad()
    def expert_errors(self, model: Any) -> Tensor:
        """Relative output error of the linears of every routed expert on the tokens the evaluation sends it, [X].

        tr(D H D^T) / tr(W H W^T), W of the original, D what quantization changed, H of the original's inputs; for each
        block the experts' gate and up together, then their down projections.
        """
        original, changed = Adapter(self.model), Adapter(model)
        errors = []
        for site, hessian_EII in self._expert_hessians().items():
            weight_EOI = original.get_weight(site).float()
            delta_EOI = changed.get_weight(site).float() - weight_EOI
            damage_E, energy_E = (
                torch.einsum("eoi,eij,eoj->e", stack, hessian_EII, stack) for stack in (delta_EOI, weight_EOI)
            )
            errors.append(damage_E / energy_E)
        return torch.cat(errors)

    @cache  # noqa: B019  one yardstick per process
    def _expert_hessians(self) -> dict[Site, Tensor]:
        adapter = Adapter(self.model)
        sites = [site for site in adapter.all_sites() if site.kind == "routed"]
        states = {site.name: empty_state(site.num_experts, site.in_features, torch.device("cpu")) for site in sites}

        def on_rows(site: Site, expert: int, x_TI: Tensor, _: Tensor | None) -> None:
            accumulate(states[site.name], expert, x_TI, None, 0.0)

        with torch.no_grad():
            # Inputs of gate and up come from a hook, those of down from an implementation of its own.
            for stage in ("mlp_in", "mlp_down"):
                group = tuple(site for site in sites if site.stage == stage)
                with observe(adapter, group, on_rows):
                    for domain in self.streams:
                        for ids_BL in self._batches(domain):
                            self.model(input_ids=ids_BL, use_cache=False)
        return {site: mean_hessian(states[site.name]) for site in sites}

    def _batches(self, domain: str) -> list[Tensor]:
        return list(self.windows(domain).split(BATCH))

    @torch.no_grad()
    def _run_original(self, ids_BL: Tensor) -> tuple[Tensor, Any]:
        with record_routing(self.model) as routing:
            return self.model(input_ids=ids_BL, use_cache=False).logits, routing

    def _measure(self, model: Any, domain: str) -> Divergence:
        kl = nll = 0.0
        same = positions = scored = routed_same = routed = 0
        for ids_BL, (original_BLV, original_routing) in zip(self._batches(domain), self._original[domain], strict=True):
            with record_routing(model) as routing:
                logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
            kl_sum, num_same, num_positions = kl_sum_and_agreement(original_BLV, logits_BLV)
            nll_sum, num_scored = nll_sum_and_count(logits_BLV, ids_BL)
            kept, total = count_same_routing(routing, original_routing)
            kl, nll, same = kl + float(kl_sum), nll + float(nll_sum), same + int(num_same)
            positions, scored = positions + int(num_positions), scored + int(num_scored)
            routed_same, routed = routed_same + int(kept), routed + int(total)
        return Divergence(kl / positions, nll / scored, same / positions, routed_same / routed)
