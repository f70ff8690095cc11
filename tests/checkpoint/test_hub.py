"""Why something of a model could not be read: the true reason, in one line, and nothing is ever asked."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, errors

from moeq.checkpoint.hub import why_not
from moeq.checkpoint.loading import load_config, load_model, load_tokenizer, stream_model
from tests.quantized import edit_config
from tests.tiny import save_tiny

CODE = "raise SystemError('it was run')\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3_moe", tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    copy.mkdir()
    for path in tiny.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def with_code(folder: Path) -> Path:
    """A model that transformers opens by code that lies beside it."""
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit_config(folder, model_type="own", auto_map=classes)
    for name in ("configuration_own", "modeling_own"):
        (folder / f"{name}.py").write_text(CODE)
    return folder


def test_code_of_a_model_is_refused_without_a_question(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_question(*text: str) -> str:
        raise AssertionError(f"asked: {text}")

    monkeypatch.setattr("builtins.input", no_question)
    with_code(folder)
    for open_model in (load_config, load_model, stream_model):
        with pytest.raises(ValueError, match=r"needs Python code .*, and set --model\.trust_remote_code true"):
            open_model(str(folder))
    with pytest.raises(ValueError, match="it was run"):
        load_config(str(folder), trust_remote_code=True)


def test_code_of_a_tokenizer_is_refused_without_a_question(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("asked"))
    (folder / "tokenizer.json").unlink()
    said = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "tokenization_own.py").write_text(CODE)
    with pytest.raises(ValueError, match=r"the tokenizer .* needs Python code .* --model\.trust_remote_code true"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{ not json", r"no tokenizer .*: tokenizer\.json is damaged \(.*\); copy it again"),
        ("config.json", '{"model_type": "qwen', r"config\.json is damaged \(.*\); copy it again"),
        ("tokenizer.json", None, r"no tokenizer .*: it has no tokenizer\.json or tokenizer\.model"),
    ],
)
def test_a_file_that_is_damaged_or_absent_is_named(name: str, content: str | None, message: str, folder: Path) -> None:
    for path in (folder / "tokenizer_config.json", folder / name):
        path.unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(folder))


def test_a_family_that_transformers_does_not_know_is_named(folder: Path) -> None:
    edit_config(folder, model_type="my_new_moe")
    with pytest.raises(ValueError, match=r"no model could be read from the folder .*my_new_moe"):
        load_config(str(folder))


def answered(kind: type[errors.HfHubHTTPError], status: int) -> OSError:
    """What transformers raises where the hub answers so."""
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    error = OSError("We couldn't connect, and then some.")
    error.__cause__ = kind(f"{status} for url\nmore", response=response)
    return error


CASES = [
    (answered(errors.GatedRepoError, 401), r"org/model is gated: ask for access .* there is no token \(hf auth login"),
    (
        answered(errors.RepositoryNotFoundError, 404),
        r"no model found at 'org/model': .* the hub does not know it or keeps",
    ),
    (answered(errors.RevisionNotFoundError, 404), r"org/model has no revision 'v9'; check --model\.revision"),
    (answered(errors.RemoteEntryNotFoundError, 404), r"org/model has no model files at the hub"),
    (
        answered(errors.HfHubHTTPError, 401),
        r"the hub answers 401 for org/model: it asks who you are, and there is no token",
    ),
    (answered(errors.HfHubHTTPError, 403), r"the hub answers 403 for org/model: you may not read it"),
    (
        answered(errors.HfHubHTTPError, 500),
        r"the hub answers 500 for org/model: 500 for url; check access, or try later",
    ),
    (errors.LocalEntryNotFoundError("no file"), r"the hub cannot be reached for it; check the network"),
    (ConnectionError("refused"), r"the hub cannot be reached for it; check the network"),
    (errors.OfflineModeIsEnabled("off"), r"HF_HUB_OFFLINE keeps from asking; unset it, or download the model first"),
    (errors.HFValidationError("bad"), r"it is not a folder here, and this is no name of the hub; check --model\.name"),
    (
        OSError(28, "No space left", "/cache/x"),
        r"could not be stored: No space left \(/cache/x\); make room, or set HF_HOME",
    ),
]


@pytest.mark.parametrize(("error", "message"), CASES)
def test_what_the_hub_or_the_way_to_it_answered_is_said_in_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    line = why_not("model", "org/model", error, "v9")
    assert re.search(message, line), line
    assert "\n" not in line


def test_what_is_not_in_the_cache_is_said_to_be_so_where_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for open_model in (load_config, load_tokenizer, load_model):
        with pytest.raises(ValueError, match=r"found at 'org/nothing': .* HF_HUB_OFFLINE keeps from asking"):
            open_model("org/nothing")
