"""``config.json`` of an export: that of the source, key by key in its order and dialect, with what changed.

Runtimes on other versions of transformers read keys that this one translates and would not write again
(``rope_theta``, ``torch_dtype``); so the file is edited, not made of the configuration in memory.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from moeq.checkpoint.quantizer import OPENING
from moeq.disk.atomic import write_text
from moeq.export.origin import Origin
from moeq.quant.spec import Fallback

NAME = "config.json"
# How a source says that it is quantized, which no export is in the same way.
_QUANTIZED = ("quantization_config", "compression_config")
_DTYPE = ("dtype", "torch_dtype")
# Names of weight files, which are those of every export (transformers reads the key).
_WEIGHTS = "transformers_weights"
# How families say how many draft layers there are.
_DRAFT = (
    "num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_hidden_layers", "mtp_num_layers",
    "use_mtp",
)  # fmt: skip
# Read by transformers before it reads weights: without moeq it is an error that ends with this text.
_PACKED = {_WEIGHTS: OPENING}


def write_config(skeleton: PreTrainedModel, origin: Origin, folder: Path) -> None:
    """Write the configuration of an export, and that of generation where no file of the source is copied.

    Args:
        skeleton: The model that the files are of, in their dtype; packed where its configuration says so.
        origin: Of its source.
        folder: Of the export.
    """
    source = None if origin.folder is None else origin.folder / NAME
    if source is None or not source.is_file():
        _write_as_transformers(skeleton, folder)
        return
    text = source.read_text(encoding="utf8")
    config = json.loads(text)
    edited = edited_config(config, skeleton, origin)
    write_text(folder / NAME, text if edited == config else _as_text(edited))


def edited_config(source: dict[str, Any], skeleton: PreTrainedModel, origin: Origin) -> dict[str, Any]:
    """The values of a source's ``config.json`` with what is different in an export; new keys come last.

    Args:
        source: Values of the file.
        skeleton: The model that the export's files are of.
        origin: Of the export.
    """
    config: dict[str, Any] = json.loads(json.dumps(source))
    for level in _levels(config):
        for key in (*_QUANTIZED, _WEIGHTS):
            level.pop(key, None)
    if not origin.num_draft:
        announce_no_draft(config)
    _set_dtype(config, str(skeleton.dtype).removeprefix("torch."))
    text_config = config.get("text_config")
    _set_tied(config, skeleton.config)
    if isinstance(text_config, dict):
        _set_tied(text_config, skeleton.config.get_text_config())
    quantization = getattr(skeleton.config, "quantization_config", None)
    if quantization is not None:
        config |= {**_PACKED, "quantization_config": quantization.to_dict()}
    return config


def announce_no_draft(config: dict[str, Any]) -> None:
    """Let a configuration say that there are no draft layers, in the words that it says how many there are."""
    for level in _levels(config):
        level.update({key: type(level[key])(0) for key in _DRAFT if isinstance(level.get(key), int)})


def unfounded_draft(origin: Origin) -> list[Fallback]:
    """What a report has to say where a source announces draft layers that its files do not hold."""
    path = None if origin.folder is None else origin.folder / NAME
    if path is None or not path.is_file() or origin.num_draft or origin.dropped:
        return []
    levels = _levels(json.loads(path.read_text(encoding="utf8")))
    said = [f"{key}: {level[key]}" for level in levels for key in _DRAFT if level.get(key)]
    detail = f"{', '.join(said)} in the source's configuration; exports do not announce them"
    return [Fallback(NAME, "announced draft layers are not in the source's files", detail)] if said else []


def _levels(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration and those of its parts."""
    yield config
    for key, value in config.items():
        if key.endswith("_config") and key not in _QUANTIZED and isinstance(value, dict):
            yield from _levels(value)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Every part that says a dtype says this one, where that of the whole has changed."""
    said = [level[key] for level in _levels(config) for key in _DTYPE if isinstance(level.get(key), str)]
    if not said:
        config["dtype"] = dtype
    elif said[0].removeprefix("torch.") != dtype:
        for level in _levels(config):
            level.update({key: dtype for key in _DTYPE if isinstance(level.get(key), str)})


def _set_tied(config: dict[str, Any], of_model: PretrainedConfig) -> None:
    """A step may have given the head a weight of its own; nothing ties what was not."""
    says = config.get("tie_word_embeddings", getattr(type(of_model), "tie_word_embeddings", True))
    if says and not getattr(of_model, "tie_word_embeddings", says):
        config["tie_word_embeddings"] = False


def _write_as_transformers(skeleton: PreTrainedModel, folder: Path) -> None:
    """What ``save_pretrained`` writes beside weights."""
    config = skeleton.config
    config.dtype = str(skeleton.dtype).removeprefix("torch.")
    config.architectures = [type(skeleton).__name__]
    config.save_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        # transformers would take the key out of what it saves.
        written = json.loads((folder / NAME).read_text(encoding="utf8"))
        write_text(folder / NAME, _as_text(written | _PACKED))
    if skeleton.can_generate():
        skeleton.generation_config.save_pretrained(folder)


def _as_text(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
