"""Parts of the study of efficiency that write a plan's files: how fast llama.cpp runs them, what opening them takes."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import Qwen2MoeConfig

from benchmarks.lab.tables import Row
from benchmarks.runtimes.llama_cpp import LlamaCpp
from benchmarks.runtimes.mlx_lm import MlxLm
from benchmarks.speed.plan_files import opened_in_llama, opened_in_moeq, write_files, write_mlx
from benchmarks.speed.plan_memory import SIDES, memory_of
from benchmarks.speed.plan_speed import in_turns
from benchmarks.studies.efficiency_plans import DENSE, GRID, config_of, shapes_of
from moeq.checkpoint.packed_weight import PackedFormat
from moeq.formats.gguf import NAME

Grids = Mapping[str, PackedFormat]
SMALL = {
    "hidden_size": 256, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "num_experts": 8,
    "num_hidden_layers": 2, "vocab_size": 512,
}  # fmt: skip


@dataclass
class PlanFiles:
    """Files of plans, each for as long as it is measured.

    Attributes:
        config: Of the model.
        folder: For the files that every plan is measured with.
    """

    config: Qwen2MoeConfig
    folder: Path

    @cached_property
    def dense(self) -> Path:
        """In bfloat16."""
        return self._kept("dense", self.config, {})

    @cached_property
    def small(self) -> Path:
        """Of a small model at 4 bits."""
        config = config_of(**SMALL)
        four = PackedFormat.of(replace(GRID, bits=4))
        return self._kept("small", config, {weight.name: four for weight in shapes_of(config)})

    @cached_property
    def dense_in_llama(self) -> LlamaCpp:
        """The file in bfloat16, open."""
        return LlamaCpp(self.dense / "gguf" / NAME)

    @cached_property
    def dense_in_mlx(self) -> MlxLm:
        """The folder in bfloat16, open in float32."""
        with TemporaryDirectory() as folder:
            write_mlx(self.config, {}, Path(folder))
            return MlxLm(Path(folder) / "mlx")

    def times(self, grids: Grids, tasks: Mapping[str, int], turns: int) -> Row:
        """Seconds of opening, and of tasks in llama.cpp beside bfloat16; no grids are bfloat16 itself."""
        with self._written(grids) as (folder, found):
            found["moeq"] = opened_in_moeq(folder / "export")
            if "refused" in found:
                return found
            found["llama.cpp"] = opened_in_llama(folder / "gguf")
            sides = {DENSE: self.dense_in_llama}
            if grids:
                sides["plan"] = LlamaCpp(folder / "gguf" / NAME)
            found |= {"prompt": tasks["prompt"], "seconds": in_turns(sides, tasks, turns)}
            if grids:
                sides["plan"].close()
        return found

    def times_in_mlx(self, grids: Grids, tasks: Mapping[str, int], turns: int) -> Row:
        """Seconds of tasks in mlx-lm beside the model without grids, both in float32 where nothing is quantized."""
        with TemporaryDirectory() as temporary:
            found = write_mlx(self.config, grids, Path(temporary)) | {"experts": self.config.num_experts}
            if "refused" in found:
                return found
            sides = {DENSE: self.dense_in_mlx}
            if grids:
                sides["plan"] = MlxLm(Path(temporary) / "mlx")
            found |= {"prompt": tasks["prompt"], "seconds": in_turns(sides, tasks, turns)}
            if grids:
                sides["plan"].close()
        return found

    def memory(self, grids: Grids) -> Row:
        """What processes that open the files take."""
        with self._written(grids) as (folder, found):
            sides = [side for side in SIDES if side == "moeq" or "refused" not in found]
            return found | {side: memory_of(side, folder, self.small) for side in sides}

    @contextmanager
    def _written(self, grids: Grids) -> Iterator[tuple[Path, Row]]:
        """Folder of the files of a plan, and what is known of them."""
        with TemporaryDirectory() as temporary:
            folder = Path(temporary) if grids else self.dense
            found = write_files(self.config, grids, folder) if grids else {}
            if "refused" not in found:
                found["gguf_bytes"] = (folder / "gguf" / NAME).stat().st_size
            yield folder, found | {"experts": self.config.num_experts}

    def _kept(self, name: str, config: Qwen2MoeConfig, grids: Grids) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)  # of other options, or cut short
        folder.mkdir(parents=True)
        write_files(config, grids, folder)
        return folder
