"""Calibration sets of the studies: text by domain, the mixture that only an oracle knows, and what the model writes.

All sets are windows of 256 tokens for the bundled model; no window that is evaluated is in any of them.  Of a sampled
set the first sequences are the set that a smaller ``num_sequences`` writes (chunks follow each other), so one file per
mode and seed serves all sizes.

Legend: N windows, L tokens of a window.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lab.yardstick import Yardstick
from benchmarks.recipes.reference_model.corpus import arithmetic_lines
from moeq.disk.texts import read_documents, token_stream
from moeq.sampling.balance import is_degenerate
from moeq.sampling.candidates import first_token_candidates
from moeq.sampling.ebss_spec import EBSSSpec
from moeq.sampling.effective import measure_evidence
from moeq.sampling.next_token import ModelNextToken
from moeq.sampling.parts import SetWriter, sample_set
from moeq.sampling.store import load_sampled, save_sampled
from moeq.sampling.text import text_windows

LENGTH = 256
PROSE = Path("assets/reference-moe/texts/wikitext2_validation.txt")
SEQUENCES_AT_ONCE = 32
SAMPLED: dict[str, EBSSSpec] = {
    "plain": EBSSSpec(mode="stochastic", branches=1, balance=False),
    "stochastic": EBSSSpec(mode="stochastic"),
    "paper": EBSSSpec(mode="paper"),
    "corpus": EBSSSpec(mode="corpus"),
}


def calibration_set(
    yardstick: Yardstick, arm: str, num_windows: int, seed: int, folder: Path, num_written: int = 0
) -> Tensor:
    """int64 [N, L].

    Args:
        yardstick: The bundled model and its evaluation texts.
        arm: ``prose``, ``mixture`` (a quarter of each domain), or one of ``SAMPLED``.
        num_windows: N.
        seed: Of windows and draws.
        folder: Keeps sampled sets.
        num_written: Sequences that a sampled set gets when it is written, for later calls that need more.
    """
    if arm == "prose":
        return text_windows(token_stream(read_documents(PROSE), yardstick.tokenizer), LENGTH, num_windows, seed)
    if arm == "mixture":
        return mixture(yardstick, num_windows, seed)
    return sampled_set(yardstick, SAMPLED[arm], arm, seed, folder, num_windows, num_written)


def domain_windows(yardstick: Yardstick, domain: str, num_windows: int, seed: int) -> Tensor:
    """Windows of one domain that are not evaluated, drawn by a seed; arithmetic is generated anew."""
    generator = torch.Generator().manual_seed(seed)
    if domain == "prose":
        return calibration_set(yardstick, "prose", num_windows, seed, Path())
    if domain == "arithmetic":
        # From a seed that neither training nor the evaluation text uses.
        lines = arithmetic_lines(random.Random(f"calibration {seed}"), num_windows * LENGTH // 5)
        ids_T = torch.tensor(yardstick.tokenizer("\n".join(lines))["input_ids"])
        return ids_T[: num_windows * LENGTH].view(num_windows, LENGTH)
    unused_NL = yardstick.unused_windows(domain)
    return unused_NL[torch.randperm(len(unused_NL), generator=generator)[:num_windows]]


def mixture(yardstick: Yardstick, num_windows: int, seed: int) -> Tensor:
    """As many windows of every domain, in random order."""
    share = num_windows // len(yardstick.streams)
    windows_NL = torch.cat([domain_windows(yardstick, domain, share, seed) for domain in yardstick.streams])
    return windows_NL[torch.randperm(len(windows_NL), generator=torch.Generator().manual_seed(seed))]


def sampled_set(
    yardstick: Yardstick, spec: EBSSSpec, label: str, seed: int, folder: Path, num_windows: int, num_written: int = 0,
    writer: Any = None,
) -> Tensor:  # fmt: skip
    """The first ``num_windows`` sequences of a file that holds as many, or one that is written now.

    By the original, or by another ``writer`` with the same tokenizer.
    """
    name = label.replace(" ", "_")
    for path in folder.glob(f"{name}-*-{seed}.safetensors"):
        num_there = int(path.stem.split("-")[-2])
        # Part of a chunk is not what a smaller set would be: sequences of a chunk complete each other.
        if num_there == num_windows or (num_there > num_windows and num_windows % SEQUENCES_AT_ONCE == 0):
            return load_sampled(path).ids_NT[:num_windows]
    num_sequences = num_windows if num_windows % SEQUENCES_AT_ONCE else max(num_written, num_windows)
    spec = replace(spec, num_sequences=num_sequences, length=LENGTH, seed=seed)
    path = folder / f"{name}-{spec.num_sequences}-{seed}.safetensors"
    model, decode = writer or yardstick.model, yardstick.tokenizer.batch_decode
    sampler = SetWriter(
        spec, SEQUENCES_AT_ONCE, first_token_candidates(model, yardstick.tokenizer),
        lambda ids_NL: [is_degenerate(text) for text in decode(ids_NL)],
        lambda ids_NL: measure_evidence(model, ids_NL), path.with_suffix(".parts"),
    )  # fmt: skip
    with ModelNextToken(model) as next_token:
        save_sampled(path, sample_set(sampler, next_token, model.device))
    return load_sampled(path).ids_NT[:num_windows]
