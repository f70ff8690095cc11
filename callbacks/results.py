"""Turn an evaluation into one row of a result table."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from moeq.export.folder import MANIFEST
from moeq.module import MoEQuantModule
from moeq.report import markdown_table, result_row, write_results
from moeq.tasks.evaluate import SetMetrics

BITS_OF_DTYPE = {"torch.float32": 32.0, "torch.bfloat16": 16.0, "torch.float16": 16.0}


class Results(Callback):
    """Writes results.json and results.md after validate, and prints the table."""

    affects_weights = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and print the row of the evaluated model."""
        assert isinstance(pl_module, MoEQuantModule)
        metrics = {}
        for set_metrics in pl_module.set_metrics:
            assert isinstance(set_metrics, SetMetrics)
            metrics[set_metrics.name] = set_metrics.compute()
        if not trainer.is_global_zero:
            return
        row = result_row(metrics, **describe_model(pl_module))
        write_results([row], pl_module.run_dir)
        rank_zero_info(f"\n{markdown_table([row])}")


def describe_model(module: MoEQuantModule) -> dict[str, Any]:
    """Method, bits and size of the evaluated model: from the manifest of an export, else of the dtype it has."""
    name = module.hparams["name"]
    manifest = Path(name) / MANIFEST
    bits = BITS_OF_DTYPE.get(str(module.model.dtype), 16.0)
    known: dict[str, Any] = {
        "method": module.hparams["label"] or name,
        "bits": bits,
        "average_bits": bits,
        "seconds": 0.0,
    }
    if manifest.is_file():
        metadata = json.loads(manifest.read_text(encoding="utf8"))["metadata"]
        known |= {key: metadata[key] for key in known if metadata.get(key) is not None}
    files = list(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
    size = sum(path.stat().st_size for path in files)
    if not files:
        size = sum(p.numel() * p.element_size() for p in module.model.parameters())
    return {**known, "num_bytes": size}
