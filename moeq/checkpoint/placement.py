"""Where the weights of a model are going to be: all in memory, or one block of them at a time.

"memory" is the whole model, on its device; "stream" a block at a time, from the files of its folder
(``moeq.checkpoint.stream``); "auto" is stream where the model does not fit with what the run needs beside it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from moeq.checkpoint.hub import weights_folder

__all__ = ["Asked", "Kind", "Placement", "choose_placement", "stream_obstacle", "weights_folder"]

Asked = Literal["auto", "memory", "stream"]
Kind = Literal["memory", "stream"]


@dataclass(frozen=True)
class Placement:
    """Where a model is going to be, and why, as a sentence for the user."""

    kind: Kind
    reason: str


def choose_placement(asked: Asked, name: str, need_bytes: int, free_bytes: int, obstacle: str | None) -> Placement:
    """Where a model goes.

    Args:
        asked: ``--model.placement``.
        name: The model, for messages.
        need_bytes: The whole model, with everything that the run has in memory beside it.
        free_bytes: Memory of the device, or of the host where that is less, before anything is loaded.
        obstacle: Why the model cannot be streamed (``stream_obstacle``); None where it can.

    Raises:
        ValueError: It can be neither held nor streamed, or is to be streamed and cannot.
    """
    needs = f"{name} needs {need_bytes / 1e9:.1f} GB in memory, of {free_bytes / 1e9:.1f} GB that are free"
    fits = need_bytes <= free_bytes
    if asked not in get_args(Asked):
        raise ValueError(f"placement ({asked!r}) must be one of {', '.join(get_args(Asked))}; choose auto")
    if asked == "memory":
        return Placement("memory", f"{needs}, and is held whole as asked")
    if asked == "auto" and fits:
        return Placement("memory", f"{needs}, and is held whole")
    if obstacle is None:
        why = "so its blocks are streamed" if not fits else "and its blocks are streamed as asked"
        return Placement("stream", f"{needs}, {why}")
    if asked == "stream":
        raise ValueError(f"{name} cannot be streamed: {obstacle}; set --model.placement memory")
    raise ValueError(
        f"{needs}, and it cannot be streamed: {obstacle}; open it where it fits, or set --model.placement memory to "
        "try it all the same"
    )


def stream_obstacle(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> str | None:
    """Why the blocks of a model cannot be streamed, told from its configuration and the names of its files."""
    from moeq.checkpoint.configuration import load_config

    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        return "it is quantized already"
    if Path(name).is_dir() and not any((*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin"))):
        return "its folder has no weights"
    return None
