r"""Turn the last checkpoint of the recipe into the asset ``assets/reference-moe`` and measure it as saved.

    python -m benchmarks.recipes.reference_model.card --data-dir DIR \
        --checkpoint runs/reference_model/checkpoints/last.ckpt

writes the Hugging Face files (bfloat16), ``card.json`` with every number and ``README.md``, the card.
"""

import argparse
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.recipes.reference_model.corpus import (
    arithmetic_lines,
    detokenize_wikitext,
    gsm8k_document,
    read_rows,
    read_text,
    split_python,
    wikitext_articles,
)
from benchmarks.recipes.reference_model.measure import WINDOW, exact_match, measure_windows, usage_report
from benchmarks.recipes.reference_model.save import save_model
from benchmarks.recipes.reference_model.texts import ARITHMETIC_LINES, ARITHMETIC_SEED, ARITHMETIC_SUMS, distinct_sums
from moeq.disk.texts import token_stream
from moeq.tasks.arithmetic import build_problems
from moeq.tasks.windows import consecutive_windows

HERE = Path(__file__).parent
NUM_SHOTS = 4
NAMES = {
    "wikitext2": "WikiText-2 raw test, as published",
    "wikitext2_detokenized": "WikiText-2 raw test, detokenised",
    "python": "Python, held-out tenth of the standard library",
    "python_shipped": "Python, the part of it that ships in `texts/`",
    "gsm8k": "GSM8K test",
    "arithmetic": "arithmetic lines of another seed",
}
# One entry per domain of the training mixture.
USAGE_DOMAINS = {"prose": "wikitext2", "python": "python", "gsm8k": "gsm8k", "arithmetic": "arithmetic"}


def held_out_documents(data_dir: Path, texts_dir: Path) -> dict[str, list[str]]:
    """Documents of every set of ``NAMES``."""
    articles = wikitext_articles(read_text(data_dir / "wikitext-2-raw/test.txt"))
    lines = arithmetic_lines(random.Random(ARITHMETIC_SEED), ARITHMETIC_LINES)
    return {
        "wikitext2": articles,
        "wikitext2_detokenized": [detokenize_wikitext(article) for article in articles],
        "python": [row["text"] for row in split_python(read_rows(data_dir / "python-stdlib/train.jsonl.gz"))[1]],
        "python_shipped": [row["text"] for row in read_rows(texts_dir / "python_heldout.jsonl")],
        "gsm8k": [gsm8k_document(row) for row in read_rows(data_dir / "gsm8k/test.jsonl")],
        "arithmetic": ["\n".join(lines)],
    }


def measure(model: nn.Module, tokenizer: Any, documents: dict[str, list[str]]) -> dict[str, Any]:
    """Every number of the card that comes from running the model."""
    losses, counts = {}, {}
    for name, texts in documents.items():
        windows_NT = consecutive_windows(token_stream(texts, tokenizer), WINDOW)
        losses[name], counts[name] = measure_windows(model, windows_NT)
    problems = build_problems(distinct_sums(ARITHMETIC_SUMS, ARITHMETIC_SEED + 1), ARITHMETIC_SUMS, NUM_SHOTS)
    return {
        "loss": losses,
        "exact_match_sums": {"share": exact_match(model, tokenizer, problems), "num_problems": ARITHMETIC_SUMS},
        "usage": usage_report({domain: counts[name] for domain, name in USAGE_DOMAINS.items()}),
    }


def training_facts(checkpoint: dict[str, Any], recipe: dict[str, Any], log_dir: Path) -> dict[str, Any]:
    """Steps, tokens, seed and, where the event files are at hand, the wall time of the run."""
    data = checkpoint["datamodule_hyper_parameters"]
    ranks = recipe["trainer"]["devices"]
    tokens_per_step = ranks * data["batch_size"] * data["length"]
    return {
        "steps": checkpoint["global_step"],
        "planned_steps": checkpoint["hyper_parameters"]["num_steps"],
        "ranks": ranks,
        "tokens_per_step": tokens_per_step,
        "tokens": checkpoint["global_step"] * tokens_per_step,
        "seed": recipe["seed_everything"],
        "minutes": _minutes(log_dir),
    }


def _minutes(log_dir: Path) -> float | None:
    """Minutes between the first and the last event of each event file, added up."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    seconds = 0.0
    for path in sorted(log_dir.glob("events.out.tfevents.*")):
        times = [event.wall_time for event in EventFileLoader(str(path)).Load()]
        seconds += max(times, default=0.0) - min(times, default=0.0)
    return round(seconds / 60, 1) if seconds else None


def asset_facts(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Size and digest of the weights, and the shape of the model."""
    weights = folder / "model.safetensors"
    config: Any = model.config
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": weights.stat().st_size,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "hidden_size": config.hidden_size,
        "blocks": config.num_hidden_layers,
        "experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "vocabulary": config.vocab_size,
    }


def render(card: dict[str, Any]) -> str:
    """The card in Markdown, from its template and numbers."""
    loss_rows = [
        f"| {NAMES[name]} | {loss['nats_per_token']:.3f} | {loss['num_tokens']:,} |"
        for name, loss in card["loss"].items()
    ]
    usage = card["usage"]
    minutes = card["training"]["minutes"]
    return (HERE / "card_template.md").read_text(encoding="utf8").format(
        **card["asset"], **card["training"], **card["exact_match_sums"],
        megabytes=card["asset"]["bytes"] / 1e6,
        million_tokens=card["training"]["tokens"] / 1e6,
        wall_time="not recorded" if minutes is None else f"{minutes:.0f} minutes",
        loss_rows="\n".join(loss_rows),
        variation_rows="\n".join(f"| {d} | {cv:.2f} |" for d, cv in usage["coefficient_of_variation"].items()),
        usage_rows="\n".join(_usage_rows(usage["share"])),
        least_used=min(min(row) for row in usage["largest_share"]),
        threshold=usage["threshold"],
        unused=_unused(usage["unused"]),
        even=100 / card["asset"]["experts"],
        expert_heads=" | ".join(str(expert) for expert in range(card["asset"]["experts"])),
        expert_rules="---|" * card["asset"]["experts"],
    )  # fmt: skip


def _usage_rows(share: dict[str, list[list[float]]]) -> list[str]:
    num_blocks = len(next(iter(share.values())))
    return [
        f"| {block} | {domain} | " + " | ".join(f"{100 * value:.1f}" for value in share[domain][block]) + " |"
        for block in range(num_blocks)
        for domain in share
    ]


def _unused(unused: list[list[int]]) -> str:
    if not unused:
        return "every expert is used by at least one domain"
    experts = ", ".join(f"expert {expert} of block {block}" for block, expert in unused)
    return f"{len(unused)} experts are used by no domain: {experts}"


def main() -> None:
    """Write the asset, measure it and write its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="Lightning checkpoint of the recipe")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the public data sets")
    parser.add_argument("--output", type=Path, default=Path("assets/reference-moe"), help="where the asset goes")
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/reference_model/data"), help="trained tokenizer")
    parser.add_argument("--log-dir", type=Path, default=Path("runs/reference_model/log"), help="event files")
    parser.add_argument("--texts", type=Path, default=Path("assets/reference-moe/texts"), help="evaluation texts")
    arguments = parser.parse_args()
    checkpoint = torch.load(arguments.checkpoint, map_location="cpu", weights_only=True)
    recipe = yaml.safe_load((HERE / "config.yaml").read_text(encoding="utf8"))
    save_model(checkpoint, AutoTokenizer.from_pretrained(arguments.tokenizer), arguments.output)
    model = AutoModelForCausalLM.from_pretrained(arguments.output).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.output)
    card = {
        "asset": asset_facts(model, arguments.output),
        "training": training_facts(checkpoint, recipe, arguments.log_dir),
        **measure(model, tokenizer, held_out_documents(arguments.data_dir, arguments.texts)),
    }
    (arguments.output / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf8")
    (arguments.output / "README.md").write_text(render(card), encoding="utf8")
    print(f"wrote {arguments.output}; losses {card['loss']}; sums {card['exact_match_sums']}")


if __name__ == "__main__":
    main()
