"""Where the files of a model come from, and the true reason, in one line, where they do not."""

import json
from pathlib import Path
from typing import Any

from moeq.disk.folder import INDEX

PICKLED = "pytorch_model.bin"
PICKLED_INDEX = f"{PICKLED}.index.json"
# Weights in formats that are not read, or second copies of those that are.
_OTHER_WEIGHTS = (
    "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.ckpt", "consolidated*", "original/*", "metal/*",
    "onnx/*", "*.bin",
)  # fmt: skip


def weights_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a model's files: the one that is named, or the local copy of the hub's, which is downloaded.

    Args:
        name: Folder or hub id.
        revision: Branch, tag or commit at the hub; None is its main branch.

    Raises:
        ValueError: It is neither, or the hub does not give it; the message has the reason.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, ignore_patterns=[*_OTHER_WEIGHTS]))
        if not any(folder.glob("*.safetensors")):
            pickled = [f"{PICKLED.removesuffix('.bin')}*.bin"]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=pickled))
    except Exception as error:  # HTTP, cache, disk and name errors have no base class of their own
        raise ValueError(why_not("model", name, error, revision)) from error
    return folder


def why_not(what: str, name: str, error: BaseException, revision: str | None = None) -> str:
    """One line that says why something of a model could not be read.

    Args:
        what: "model" or "tokenizer".
        name: Folder or hub id.
        error: What was raised; the first known cause of it decides.
        revision: What was asked for.
    """
    chain = list(_causes(error))
    if needs_code(chain):
        return (
            f"the {what} {name} needs Python code that comes with it; read that code, and set "
            "--model.trust_remote_code true to run it"
        )
    folder = Path(name)
    if folder.is_dir():
        return _why_not_in(folder, what, name, chain)
    return _why_not_at_hub(what, name, chain, revision) or (
        f"no {what} found at {name!r}: it is not a folder here and {_first_line(chain[-1])}; check --model.name"
    )


def needs_code(chain: list[BaseException]) -> bool:
    """Whether an error says that code of a model was not to be run."""
    return any("trust_remote_code" in str(error) for error in chain)


def _causes(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _why_not_in(folder: Path, what: str, name: str, chain: list[BaseException]) -> str:
    present = sorted(path.name for path in folder.iterdir())[:8]
    listed = f"(it holds {present})"
    if what == "model" and not (folder / "config.json").is_file():
        return (
            f"no model could be read from the folder {name}: it has no config.json {listed}; "
            "give a Hugging Face model folder"
        )
    for path in sorted(folder.glob("*.json")):
        if damage := _json_damage(path):
            return f"no {what} could be read from the folder {name}: {path.name} is damaged ({damage}); copy it again"
    if what == "tokenizer" and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        files = " or ".join(TOKENIZER_FILES[:2])
        return (
            f"no tokenizer could be read from the folder {name}: it has no {files} {listed}; copy the "
            "tokenizer's files into it"
        )
    return f"no {what} could be read from the folder {name}: {_first_line(chain[0])}"


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "tiktoken.model",
    "spiece.model", "tekken.json",
)  # fmt: skip


def _json_damage(path: Path) -> str | None:
    try:
        json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        return _first_line(error)
    return None


def _why_not_at_hub(what: str, name: str, chain: list[BaseException], revision: str | None) -> str | None:
    """The reason for which the hub, or the way to it, did not give a model; None where it is not known."""
    from huggingface_hub import errors, get_token

    token = "" if get_token() else ", and there is no token (hf auth login, or HF_TOKEN)"
    nowhere = f"no {what} found at {name!r}: it is not a folder here, and"
    offline = (
        f"{nowhere} the cache of the hub does not hold it, and HF_HUB_OFFLINE keeps from asking; unset it, or download "
        "the model first"
    )
    unreachable = f"{nowhere} the hub cannot be reached for it; check the network, or give a folder"
    answers: tuple[tuple[Any, str | None], ...] = (
        (errors.GatedRepoError, f"{name} is gated: ask for access on its page at the hub{token}"),
        (errors.DisabledRepoError, f"the hub has disabled {name}; choose another source"),
        (errors.RevisionNotFoundError, f"{name} has no revision {revision!r}; check --model.revision"),
        (errors.RepositoryNotFoundError, f"{nowhere} the hub does not know it or keeps it private{token}"),
        (errors.RemoteEntryNotFoundError, f"{name} has no {what} files at the hub; check --model.name"),
        (errors.HFValidationError, f"{nowhere} this is no name of the hub; check --model.name"),
        (errors.OfflineModeIsEnabled, offline),
        (errors.HfHubHTTPError, None),
        (errors.LocalEntryNotFoundError, offline if _is_offline() else unreachable),
        ((ConnectionError, TimeoutError), unreachable),
    )
    for kind, answer in answers:
        if error := next((each for each in chain if isinstance(each, kind)), None):
            return answer or _status_message(name, error, token)
    return _local_message(name, chain[0], offline if _is_offline() else unreachable)


def _status_message(name: str, error: BaseException, token: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", "an error")
    meaning = {401: f"it asks who you are{token}", 403: f"you may not read it{token}"}
    return f"the hub answers {status} for {name}: {meaning.get(status, _first_line(error))}; check access, or try later"


def _local_message(name: str, error: BaseException, unreachable: str) -> str | None:
    """What the machine itself has to say; None where it is not known."""
    if isinstance(error, OSError) and error.errno:
        where = f" ({error.filename})" if error.filename else ""
        return f"the files of {name} could not be stored: {error.strerror}{where}; make room, or set HF_HOME"
    return unreachable if "connect" in _first_line(error) else None


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def weights_missing_in(folder: Path) -> str:
    """Why a folder has no weights under a name that is read, with a remedy."""
    other = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".gguf"))
    if not other:
        return f"{folder} holds no weights (model.safetensors, or {INDEX} and its files); download or copy it again"
    return (
        f"{folder} holds {other[:4]}, but weights are read from model.safetensors, {PICKLED}, or the files of "
        f"{INDEX} or {PICKLED_INDEX}; rename what is the model, or convert it to safetensors"
    )
