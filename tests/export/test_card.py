"""The card of an export has metadata that the hub takes, and says what a reader has to know."""

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from moeq.checkpoint.loading import load_model
from moeq.disk.folder import check_integrity
from moeq.export.card import Tally, card_text, with_quality, write_card
from moeq.export.dense import write_dense
from moeq.export.finished import held
from moeq.export.made import Made, command_line, describe_data
from moeq.export.moeq_format import write_checkpoint
from moeq.sampling.ebss_spec import EBSSSpec
from tests.export.rounding import round_model
from tests.tiny import save_tiny

MADE = Made(
    source="org/Some-MoE", identity="org/Some-MoE@0123abc", method="MoEQuant", bits=3.0, average_bits=3.267,
    data="TextDataModule: path c4.txt", data_digest="feed", command="python main.py fit --config configs/a.yaml",
)  # fmt: skip
PACKED = Tally("packed", num_bytes=2_500_000_000, num_quantized=62, num_kept=19, num_carried=5, num_draft=4)


def test_the_hub_reads_the_metadata_of_a_card() -> None:
    source = {"license": "other", "license_name": "mine", "license_link": "LICENSE", "language": ["en", "de"], "x": 1}
    data = ModelCard(card_text(MADE, PACKED, source)).data.to_dict()
    assert data == {
        "library_name": "moeq", "base_model": "org/Some-MoE", "base_model_relation": "quantized", "license": "other",
        "license_name": "mine", "license_link": "LICENSE", "language": ["en", "de"], "pipeline_tag": "text-generation",
        "tags": ["moeq", "quantized", "mixture-of-experts", "3-bit"],
    }  # fmt: skip
    dense = ModelCard(card_text(MADE, replace(PACKED, kind="dense"), {"pipeline_tag": "image-text-to-text"})).data
    assert (dense.library_name, dense.pipeline_tag, dense.license) == ("transformers", "image-text-to-text", None)


def test_the_card_of_a_wrapper_names_the_class_that_opens_it() -> None:
    text = card_text(MADE, replace(PACKED, opener="AutoModelForImageTextToText"), {})
    assert 'model = AutoModelForImageTextToText.from_pretrained("export")' in text
    assert ModelCard(text).data.pipeline_tag == "image-text-to-text"


def test_a_card_says_what_was_made_of_what() -> None:
    text = card_text(MADE, PACKED, {})
    for part in (
        "| source | org/Some-MoE |", "| revision | 0123abc |", "| method | MoEQuant |", "| 3.000 |", "| 3.267 |",
        "| size | 2.500 GB |", "5 tensors, of which 4 are of draft layers", "TextDataModule: path c4.txt", "feed",
        MADE.command, "import moeq.checkpoint.quantizer", "Not measured yet", "## What it is not valid for", "vLLM",
    ):  # fmt: skip
        assert part in text, part


def test_a_folder_of_the_hubs_cache_is_the_model_that_it_is_a_copy_of() -> None:
    made = replace(MADE, source="/x/hub/models--org--Some-MoE/snapshots/00ff", identity="sha256:1")
    text = card_text(made, PACKED, {})
    assert ModelCard(text).data.base_model == "org/Some-MoE"
    assert "| revision | 00ff |" in text


def test_a_local_source_is_told_by_its_name_and_digest_alone(tmp_path: Path) -> None:
    text = card_text(replace(MADE, source=str(tmp_path), identity="sha256:1"), PACKED, {})
    assert ModelCard(text).data.base_model is None
    assert f"| source | `{tmp_path.name}` |" in text
    assert str(tmp_path) not in text
    assert "| revision | sha256:1 |" in text


def test_both_exports_have_a_card_with_the_licence_of_their_source(tmp_path: Path) -> None:
    folder = save_tiny("olmoe", tmp_path / "model", num_hidden_layers=1)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# a source\n")
    model = load_model(str(folder))
    write_checkpoint(model, None, round_model(model), tmp_path / "packed", metadata={})
    write_dense(held(model), None, tmp_path / "dense")
    for kind in ("packed", "dense"):
        card = ModelCard.load(tmp_path / kind / "README.md")
        assert card.data.license == "apache-2.0"
        assert "| source | `model` |" in card.text
        (tmp_path / kind / "README.md").write_text("edited")
        check_integrity(tmp_path / kind)


@pytest.mark.parametrize("content", ["no metadata", "---\n- a list\n---\n", "---\nlicense: [\n---\n", "\x00"])
def test_a_card_of_the_source_that_cannot_be_read_is_no_obstacle(content: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(content)
    (tmp_path / "export").mkdir()
    write_card(tmp_path / "export", MADE, PACKED, tmp_path)
    assert ModelCard.load(tmp_path / "export/README.md").data.license is None


def test_what_was_measured_takes_the_place_of_what_stood_there() -> None:
    before = card_text(MADE, PACKED, {})
    once = with_quality(before, "| task | kl |\n|---|---|\n| prose | 0.1 |")
    assert "Not measured yet" not in once
    assert "| prose | 0.1 |\n\n## How it was made" in once
    twice = with_quality(once, "| prose | 0.2 |\n")
    assert "0.1" not in twice.partition("## Quality")[2].partition("## How")[0]
    assert twice == with_quality(before, "| prose | 0.2 |")
    assert with_quality("my own card", "| prose | 0.2 |") == "my own card"


def test_a_command_is_what_makes_the_same_files() -> None:
    words = ["/x/main.py", "fit", "--config", "a b.yaml", "--trainer.default_root_dir", "/secret", "--model.bits=3"]
    left_out = {"trainer.default_root_dir", "model.placement"}
    assert command_line([*words, "--model.placement=stream"], left_out) == (
        "python main.py fit --config 'a b.yaml' --model.bits=3"
    )
    assert command_line(["/usr/bin/pytest", "fit"], left_out) is None
    assert command_line([], left_out) is None


def test_data_are_described_by_their_options_without_places() -> None:
    options = {"path": "/home/me/c4.txt", "batch_size": 8, "spec": EBSSSpec(seed=5), "_ids": 3, "dataset": None}
    text = describe_data(object(), options)
    assert text.startswith("object: path c4.txt, batch_size 8, num_sequences 128")
    assert "seed 5" in text
