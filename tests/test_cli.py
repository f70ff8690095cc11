"""What the command line knows by name, says about itself, and makes of an error of the parser."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from callbacks.survey import Survey
from main import import_parts, main
from moeq.allocation.decide import AllocationSpec
from moeq.allocation.plan import DEFAULT_CHOICES, parse_choices
from moeq.cli import close_names, known_parts
from moeq.models.rotation import RotationSpec
from moeq.module import MoEQuantModule
from moeq.quant.learned import LearnedSpec
from moeq.quant.spec import GridSpec, SolveSpec
from moeq.sampling.ebss_spec import EBSSSpec
from moeq.survey.kronecker_spec import KroneckerSpec
from moeq.survey.survey_spec import SurveyOptions, SurveySpec

CONFIGS = sorted(Path("configs").glob("*.yaml"))
OWN = ["--config=configs/rtn_w3.yaml"]


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What a command line that only prints something prints."""
    with pytest.raises(SystemExit) as stop:
        main([*args])
    assert not stop.value.code
    return capsys.readouterr().out


def parsed(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, list[str]]:
    """Class paths that a command line comes to, of callbacks and data."""
    config = yaml.safe_load(printed(capsys, "fit", *args, "--print_config"))
    return {
        "callbacks": [each["class_path"] for each in config["trainer"]["callbacks"]],
        "data": [config["data"]["class_path"]],
    }


def class_paths(config: Path) -> list[tuple[str, str]]:
    """Option and class_path of everything that a configuration names."""
    content = yaml.safe_load(config.read_text())
    callbacks = [("trainer.callbacks", each["class_path"]) for each in content["trainer"]["callbacks"]]
    return [*callbacks, ("data", content["data"]["class_path"])]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configurations_name_classes_by_their_names_alone(config: Path) -> None:
    import_parts()
    for option, name in class_paths(config):
        assert name in known_parts(option), name


def test_what_cannot_be_chosen_is_not_offered() -> None:
    import_parts()
    assert known_parts("trainer.callbacks").keys() >= {"AWQ", "GPTQ", "Survey"}
    calibration = {"EBSSDataModule", "GivenIdsDataModule", "TextDataModule"}
    assert known_parts("data").keys() == calibration | {"EvaluationDataModule"}
    assert known_parts("trainer.logger") == {}


def test_a_class_is_found_by_its_name_and_by_its_path_whoever_wrote_it(capsys: pytest.CaptureFixture[str]) -> None:
    added = [f"--trainer.callbacks+={each}" for each in ("GPTQ", "callbacks.gptq.GPTQ", "tests.killer.KillAtBlock")]
    found = parsed(capsys, *OWN, *added, "--data=EBSSDataModule")
    assert found["callbacks"][-3:] == ["callbacks.gptq.GPTQ", "callbacks.gptq.GPTQ", "tests.killer.KillAtBlock"]
    assert found["data"] == ["datamodules.ebss.EBSSDataModule"]


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_help_lists_callbacks_and_datamodules_with_a_sentence_each(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(capsys, command, "--help").splitlines()
    for option in ("trainer.callbacks", "data"):
        assert any(f"--{option}.help NAME" in line for line in lines)
        for name, part in known_parts(option).items():
            (line,) = [line for line in lines if re.match(rf"  {name}  +", line)]
            assert part.__doc__ is not None
            opening = part.__doc__.replace("``", "").partition("\n")[0][:40]
            assert line.removeprefix(f"  {name}").strip().startswith(opening), line


@pytest.mark.parametrize("name", ["GPTQ", "callbacks.gptq.GPTQ"])
def test_the_options_of_a_callback_are_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "fit", "--trainer.callbacks.help", name)
    assert "--trainer.callbacks.coverage {shrink,rtn,fail}" in text
    assert "What an expert with few tokens gets" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trainer.callbacks+=GPTQX"], "trainer.callbacks: there is no class GPTQX; did you mean GPTQ. known by "),
        (["--trainer.callbacks+=callbacks.GPTQ"], r"no class callbacks.GPTQ \(module .*\); did you mean GPTQ\? "),
        (["--trainer.callbacks+=calbacks.gptq.GPTQ"], r"No module named 'calbacks'\); did you mean GPTQ\? "),
        (["--trainer.callbacks.help", "rounding"], "no class rounding; did you mean LearnedRounding"),
        (["--trainer.callbacks.help", "callbacks.GPTQ"], r"no class \(module .* 'GPTQ'\); did you mean GPTQ\? "),
        (
            ["--data=EBSS"],
            r"data: .*did you mean EBSSDataModule\? known by name are EBSSDataModule, EvaluationDataModule, ",
        ),
        (["--data=Unlike"], "data: there is no class Unlike; known by name are EBSSDataModule, "),
        (["--trainer.logger=Unlike"], "trainer.logger: there is no class Unlike; write it as package.module.Class"),
        (["--trainer.callbacks+=GPTQ", "--trainer.callbacks.kapa=2"], "'kapa' .*; --trainer.callbacks.help GPTQ lists"),
    ],
)
def test_a_class_that_does_not_exist_is_answered_with_those_that_do(args: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message) as stop:
        main(["fit", *OWN, *args])
    assert "\n" not in str(stop.value)


def test_a_name_in_the_list_of_a_configuration_is_answered_too(tmp_path: Path) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text(Path("configs/rtn_w3.yaml").read_text().replace("class_path: RTN", "class_path: RNT"))
    with pytest.raises(SystemExit, match=r"there is no class RNT; did you mean RTN\? known by name are AWQ, "):
        main(["fit", f"--config={config}"])


def test_similar_names_are_those_that_contain_a_name_or_are_spelt_like_it() -> None:
    known = ["GPTQ", "HQQ", "HessianCalibration"]
    assert close_names("hessian", known) == ["HessianCalibration"]
    assert close_names("gtpq", known) == ["GPTQ"]
    assert close_names("", known) == close_names("zzz", known) == []


@pytest.mark.parametrize("option", ["trainer.callbacks", "data"])
def test_every_option_has_a_sentence_in_the_help(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    import_parts()
    for name in known_parts(option):
        text = printed(capsys, "fit", f"--{option}.help", name).partition("Help for")[2]
        entries = re.findall(rf"^  --({option}\.\w+)\b(?!\.help)(.*?)(?=^  --|\Z)", text, re.DOTALL | re.MULTILINE)
        for given, entry in entries:
            sentence = re.sub(r"^.*?(?:\s{2,}|\n)", "", entry, count=1).strip()
            assert re.match(r"[^(]", sentence), f"{name}: {given} has no help"


def test_options_told_in_a_dataclass_are_flat_typed_and_complete(capsys: pytest.CaptureFixture[str]) -> None:
    import_parts()
    for option, name, spec in [
        ("data", "EBSSDataModule", EBSSSpec), ("trainer.callbacks", "Survey", SurveyOptions),
        ("trainer.callbacks", "BitAllocation", AllocationSpec), ("trainer.callbacks", "Rotation", RotationSpec),
        ("trainer.callbacks", "LearnedRounding", LearnedSpec), ("trainer.callbacks", "KroneckerFactors", KroneckerSpec),
    ]:  # fmt: skip
        text = printed(capsys, "fit", f"--{option}.help", name)
        for field in fields(spec):
            assert f"\n  --{option}.{field.name} " in text, field.name


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--data.num_sequence=4"],
            r"data: Option 'num_sequence' is not accepted; --data.help EBSSDataModule lists its",
        ),
        (["--data.mode=random"], r"data.mode: Expected .*'paper', 'stochastic', 'corpus'.* random"),
        (["--data.num_sequences=many"], "data.num_sequences: Expected .*int"),
        (["--data.branches=0"], r"branches \(0\) must be at least 1"),
    ],
)
def test_mistakes_in_options_told_in_a_dataclass_are_refused(args: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["fit", "--config=configs/moequant_w3.yaml", "--model.name=none", *args])


def test_an_option_has_one_default_wherever_it_can_be_given() -> None:
    model = inspect.signature(MoEQuantModule).parameters
    assert model["damping"].default == SolveSpec().damping == 0.1
    assert model["act_order"].default == SolveSpec().act_order
    for name in ("bits", "group_size", "symmetric", "clip_search"):
        assert model[name].default == getattr(GridSpec(), name)
    assert GridSpec().group_size == 64
    assert Survey().choices == AllocationSpec().choices == DEFAULT_CHOICES == (2, 3, 4, 8)
    assert SurveySpec().choices == parse_choices(DEFAULT_CHOICES, GridSpec().group_size)


MENTION = re.compile(r"\b(?:callbacks|datamodules)(?:\.[a-z_]+)?\.[A-Z]\w+")


def test_messages_and_docstrings_name_callbacks_by_what_a_configuration_takes() -> None:
    for folder in ("moeq", "callbacks", "datamodules", "configs"):
        for path in [*Path(folder).rglob("*.py"), *Path(folder).rglob("*.yaml")]:
            lines = [line for line in path.read_text().splitlines() if not re.match(r"\s*(from|import) ", line)]
            assert not MENTION.findall("\n".join(lines)), path
