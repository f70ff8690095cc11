"""Turn a checkpoint of the recipe into a Hugging Face folder: config, bfloat16 weights and tokenizer.

    python -m benchmarks.recipes.reference_model.save --checkpoint FILE --tokenizer FOLDER --output FOLDER

The recipe keeps its tokenizer in ``cache_dir`` of its data.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.recipes.reference_model.train import ReferenceMoE


def save_model(checkpoint: dict[str, Any], tokenizer: Any, output: Path) -> None:
    """Write config, generation config, bfloat16 weights and tokenizer of a Lightning checkpoint of the recipe."""
    settings = {key: value for key, value in checkpoint["hyper_parameters"].items() if not key.startswith("_")}
    module = ReferenceMoE(**settings)
    module.load_state_dict(checkpoint["state_dict"])
    model = module.model
    model.config.use_cache = model.generation_config.use_cache = True
    model.bfloat16().save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="Lightning checkpoint of the recipe")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the trained tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="where the folder goes")
    arguments = parser.parse_args()
    checkpoint = torch.load(arguments.checkpoint, map_location="cpu", weights_only=True)
    save_model(checkpoint, AutoTokenizer.from_pretrained(arguments.tokenizer), arguments.output)
    print(f"wrote {arguments.output}: {checkpoint['global_step']} steps")


if __name__ == "__main__":
    main()
