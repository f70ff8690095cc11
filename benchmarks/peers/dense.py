"""What the scripts of the peers share: arguments, packed integers back to weights, a dense folder, a report.

Needs torch and safetensors alone, so that it runs in the environment of every peer.  Both packed formats hold codes as
a stream of bits, lowest bit first, in 32-bit words without gaps: code k of b bits starts at bit k * b.

    w = scale * (code - zero),   code and zero unsigned                                (GPTQ, arXiv 2210.17323, 2)

compressed-tensors packs codes along the inputs and stores code - 2^(b-1) as an offset; GPTQ checkpoints pack along the
inputs with outputs last, and in their first version store zero - 1.

Legend: N windows, L tokens, R rows, W words, O outputs, I inputs, G groups.
"""

import argparse
import json
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# What moeq quantizes: not the router, the gate of the shared expert, the embedding or the head.
QUANTIZED = re.compile(
    r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(shared_expert|experts\.\d+)\.(gate|up|down)_proj"
    r"|block_sparse_moe\.experts\.\d+\.w[123])\.weight"
)
# Of modules in transformers, whatever files call them.
IGNORED = ("lm_head", r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$")

# Projections of an expert in files of Mixtral, and in modules of every family.
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass
class Report:
    """What a run says about itself; seconds are those of the quantization, without loading and saving."""

    peer: str
    settings: dict[str, object]
    versions: dict[str, str]
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    loaded_mb: float = 0.0
    peak_mb: float = 0.0
    num_quantized: int = 0
    max_difference: float = 0.0
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Seconds of the block, and the memory before and at the peak of the process."""
        self.loaded_mb, start, cpu_start = peak_mb(), time.perf_counter(), time.process_time()
        yield
        self.seconds, self.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        self.peak_mb = peak_mb()


def peak_mb() -> float:
    """Largest resident memory of this process so far, in MB."""
    # Not getrusage: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def parse(
    description: str | None, extra: Mapping[str, Mapping[str, object]], args: list[str] | None = None
) -> argparse.Namespace:
    """The arguments of a peer.

    Args:
        description: Docstring of the script.
        extra: Options of the peer alone, by flag: keywords of ``add_argument``.
        args: None is the command line.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the original")
    parser.add_argument("--ids", type=Path, required=True, help="token ids [N, L]: .safetensors ('ids'), .pt or .npy")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=64, help="inputs of a group; 0 is one scale per output row")
    parser.add_argument("--symmetric", action="store_true", help="without zero points")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="windows at once")
    parser.add_argument("--output", type=Path, required=True, help="folder of the dense result; must not exist")
    for flag, keywords in extra.items():
        parser.add_argument(flag, **keywords)  # type: ignore[arg-type]
    options = parser.parse_args(args)
    if options.output.exists():
        parser.error(f"--output ({options.output}) exists; give a new folder")
    return options


def start_report(peer: str, options: argparse.Namespace, packages: tuple[str, ...]) -> Report:
    """Settings as given, without places, and the versions of packages."""
    settings = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
    return Report(peer, settings, {name: version(name) for name in ("torch", "transformers", *packages)})


def load_ids(path: Path) -> Tensor:
    """int64 [N, L] of a file that is named by its kind."""
    if path.suffix == ".safetensors":
        ids_NL = load_file(path)["ids"]
    elif path.suffix == ".pt":
        ids_NL = torch.load(path)
    elif path.suffix == ".npy":
        import numpy

        ids_NL = torch.from_numpy(numpy.load(path))
    else:
        raise ValueError(f"ids ({path}) must be .safetensors, .pt or .npy; convert the file")
    if ids_NL.ndim != 2:
        raise ValueError(f"ids ({tuple(ids_NL.shape)}) must be windows of tokens [N, L]; stack them")
    return ids_NL.long()


def unpack(words_RW: Tensor, bits: int, num: int) -> Tensor:
    """The first ``num`` unsigned integers of each row of a bit stream, int64 [R, num]."""
    # One bit at a time: slow, and nothing to get wrong where an integer lies in two words.
    bits_RX = (words_RW.long().unsqueeze(-1) >> torch.arange(32)) & 1
    digits_RXb = bits_RX.flatten(1)[:, : num * bits].unflatten(1, (num, bits))
    return (digits_RXb << torch.arange(bits)).sum(-1)


def dequantize(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | float, group_I: Tensor) -> Tensor:
    """float32 [O, I]; ``group_I`` names the group of each input."""
    zero_OI = zero_OG[:, group_I] if isinstance(zero_OG, Tensor) else zero_OG
    return scale_OG.float()[:, group_I] * (codes_OI - zero_OI).float()


def read_compressed_tensors(tensors: Mapping[str, Tensor], module: str, bits: int) -> Tensor:
    """float32 [O, I] of a linear in compressed-tensors' ``pack-quantized`` format."""
    num_outputs, num_inputs = tensors[f"{module}.weight_shape"].tolist()
    scale_OG = tensors[f"{module}.weight_scale"]
    codes_OI = unpack(tensors[f"{module}.weight_packed"], bits, num_inputs)
    group_I = torch.arange(num_inputs) // (num_inputs // scale_OG.shape[1])
    packed = tensors.get(f"{module}.weight_zero_point")
    # Both are stored with the same offset, which their difference does not show.
    zero_OG = 2 ** (bits - 1) if packed is None else unpack(packed.T, bits, num_outputs).T
    return dequantize(codes_OI, scale_OG, zero_OG, group_I)


def read_gptq(tensors: Mapping[str, Tensor], module: str, bits: int, zero_offset: int) -> Tensor:
    """float32 [O, I] of a linear in a GPTQ checkpoint; ``zero_offset`` is 1 for format ``gptq``, 0 for ``gptq_v2``."""
    scale_GO, group_I = tensors[f"{module}.scales"], tensors[f"{module}.g_idx"].long()
    num_outputs = scale_GO.shape[1]
    codes_OI = unpack(tensors[f"{module}.qweight"].T, bits, len(group_I))
    # The sum stays within b bits, as in the kernels: zero 0 is stored as the largest code.
    zero_GO = (unpack(tensors[f"{module}.qzeros"], bits, num_outputs) + zero_offset) % 2**bits
    return dequantize(codes_OI, scale_GO.T, zero_GO.T, group_I)


def load_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files of a folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def spelled(found: Collection[str], module: str, part: str) -> str:
    """What a module of the original's files is called where one of its tensors is found.

    That is the same name, or with transformers' names of the projections of Mixtral's experts (llm-compressor and
    AutoRound save them so), or with that of their block, too (in the model, and in GPTQModel's files).

    Args:
        found: Keys of a folder, or of the model in memory.
        module: The module in the original's files.
        part: Last part of the key: "weight_packed".

    Raises:
        ValueError: It is there under none of these names.
    """
    parent, _, leaf = module.rpartition(".")
    renamed = f"{parent}.{_PROJECTIONS.get(leaf, leaf)}"
    for name in (module, renamed, renamed.replace(".block_sparse_moe.", ".mlp.")):
        if f"{name}.{part}" in found:
            return name
    raise ValueError(f"{part} of {module} is there under no name that this knows; add the peer's name of it")


def write_dense(options: argparse.Namespace, found: Mapping[str, Tensor], report: Report) -> None:
    """Write the peer's weights under the original's names, with its config and tokenizer, and the report.

    Args:
        options: Of ``parse``.
        found: All weights of the peer's model under names that ``spelled`` knows, quantized ones dequantized.  A weight
            that is not quantized is written as the peer left it, so that changed routers are seen by who measures.
        report: Goes to ``report.json``.

    Raises:
        ValueError: A weight is there under no name that is known, or has another shape.
    """
    dense = {}
    for name, original in load_folder(options.model).items():
        module, _, part = name.rpartition(".")
        weight = found[f"{spelled(found, module, part)}.{part}"]
        if weight.shape != original.shape:
            raise ValueError(f"{name} of the peer is {tuple(weight.shape)}, the original's is {tuple(original.shape)}")
        dense[name] = weight.to(original.dtype).contiguous()
    report.num_quantized = sum(bool(QUANTIZED.fullmatch(name)) for name in dense)
    options.output.mkdir(parents=True)
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (options.model / file).is_file():
            shutil.copy(options.model / file, options.output)
    save_file(dense, options.output / "model.safetensors", metadata={"format": "pt"})
    (options.output / "report.json").write_text(json.dumps(asdict(report), indent=1))


def largest_difference(dense: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Of quantized weights, relative to the largest of each: how far the checkpoint is from the model in memory."""
    names = [name for name in dense if QUANTIZED.fullmatch(name)]
    return max(float((dense[n].float() - other[n].float()).abs().max() / other[n].abs().max()) for n in names)
