"""Opening a model of validate where it was placed, ready to score batches."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from moeq.checkpoint.loading import load_config, load_model, stream_model
from moeq.checkpoint.opening import open_sources
from moeq.checkpoint.placement import Placement, stream_obstacle, weights_folder
from moeq.checkpoint.source_options import source_options
from moeq.disk.folder import check_integrity
from moeq.evaluation.placing import waiting_in
from moeq.kernels.compute_dtype import compute_dtype
from moeq.scoring.pass_cost import Layout
from moeq.scoring.scorer import Scorer
from moeq.scoring.streamed import StreamedScorer

GIB = 1 << 30


def open_scorer(
    settings: Mapping[str, Any],
    name: str,
    placement: Placement,
    without: Collection[Layout],
    device: torch.device,
    folder: Path,
    reserved_bytes: int = 0,
) -> Scorer:
    """Load a model, or what lies outside of its blocks where they are streamed.

    Args:
        settings: Hyper-parameters of the module.
        name: Of the model.
        placement: Whether it is streamed.
        without: Layouts that are not used.
        device: Where it runs.
        folder: Where hidden states of a streamed model wait.
        reserved_bytes: What else is going to be written there in the meantime.

    Raises:
        ValueError: It cannot be read.
    """
    dtype, compute, asked = settings["dtype"], settings["compute_dtype"], source_options(settings)
    if placement.kind == "memory":
        return Scorer(load_model(name, dtype, compute, device, **asked).to(device), without)
    check_integrity(weights_folder(name, asked["revision"]))
    model, stream = stream_model(name, dtype, compute, device, **asked)
    stream.place(device)
    waiting = waiting_in(folder, int(settings["hidden_gib"] * GIB), reserved_bytes)
    return StreamedScorer(model, stream, waiting, without)


def check_files(settings: Mapping[str, Any], name: str) -> None:
    """Refuse a model whose files were altered or lack tensors, before what takes long; no value is made.

    Args:
        settings: Hyper-parameters of the module.
        name: Of the model.

    Raises:
        ValueError: It cannot be opened.
    """
    asked = source_options(settings)
    folder = weights_folder(name, asked["revision"])
    check_integrity(folder)
    if stream_obstacle(name, **asked) is None:
        open_sources(folder, None, lambda held: held, trust_remote_code=asked["trust_remote_code"])


def computed_in(settings: Mapping[str, Any], name: str, device: torch.device) -> str:
    """Name of the dtype that a model is going to compute in, before it is loaded."""
    stored = settings["dtype"]
    if stored == "auto":
        stored = load_config(name, **source_options(settings)).dtype or torch.bfloat16
    stored = getattr(torch, str(stored).removeprefix("torch."))
    return str(compute_dtype(settings["compute_dtype"], stored, device)).removeprefix("torch.")
