"""What a user can mend, in one line: mistakes in options, and conditions of the system."""

import errno
import re
from argparse import ArgumentError

import torch

from moeq.cli import close_names, known_parts

GO_ON = "then start the same command again: it goes on after the last finished part"
# Of an OSError, what to do about it.
SYSTEM = {
    errno.ENOSPC: f"the disk is full; make room on it, {GO_ON}",
    errno.EDQUOT: f"the quota of this disk is used up; make room on it, {GO_ON}",
    errno.EFBIG: f"the file is larger than is allowed here; raise the limit (ulimit -f), {GO_ON}",
    errno.EROFS: "the disk may only be read; set --trainer.default_root_dir to a folder that may be written",
    errno.EACCES: "permission denied; change the permissions, or set another folder",
    errno.EPERM: "not permitted; change the permissions, or set another folder",
    errno.ENOENT: "there is no such file; check the path",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine; close some",
    errno.EIO: f"the disk does not read or write; check it, {GO_ON}",
    errno.ESTALE: f"the network disk has lost the file; mount it again, {GO_ON}",
    errno.ENOMEM: f"memory ran out; free some of it, {GO_ON}",
}
SMALLER = "set --model.placement stream or a smaller --data.batch_size (--data.batch_tokens for validate)"
MEMORY = f"memory ran out; {SMALLER}, {GO_ON}"
NETWORK = "check the connection, or set HF_HUB_OFFLINE=1 where everything is in the cache already"
# Modules of what libraries raise when a hub is not reached.
_NETWORK_MODULES = ("requests.", "urllib3.", "httpx", "httpcore", "aiohttp.")


def one_line(error: Exception) -> str | None:
    """What went wrong and what to do, of an error that a user can mend; None for any other."""
    if isinstance(error, ValueError | ArgumentError):
        return " ".join(first_mistake(error).splitlines())
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in text:
        return f"{MEMORY} ({text[:200]})" if text else MEMORY
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(_NETWORK_MODULES):
        return f"the network failed: {text or type(error).__name__}; {NETWORK}"
    if isinstance(error, OSError) and error.errno in SYSTEM:
        return f"{f'{error.filename}: ' if error.filename else ''}{SYSTEM[error.errno]}"
    if full := re.search(r"[Nn]o space left on device|[Dd]isk quota exceeded", text):
        return f"{full[0]}; make room on the disk, {GO_ON}"
    return None


def first_mistake(error: Exception) -> str:
    """What the user got wrong, out of an error of the parser, which lists every type that a value might have had."""
    text = str(error)
    if wrong := _wrong_class(text):
        return wrong
    if "Union subtypes" not in text:
        return text
    # Types within types: the innermost list has what was wrong, the first of its items what the user probably meant.
    *outer, errors = text.split("Errors:\n")
    items = re.findall(r"^\s*- (.+?)(?=^\s*- |\Z)", errors, re.DOTALL | re.MULTILINE)
    keys = re.findall(r'Parser key "([^"]+)"', "".join(outer))
    # Older versions of jsonargparse name first what the value was not meant to be: nothing at all.
    items = [item for item in items if "Expected a <class 'NoneType'>" not in item] or items
    mistake = " ".join(items[0].split()) if items else text
    if unknown := re.search(r"given class_path '([^']+)':.*(Option '.+' is not accepted)", text, re.DOTALL):
        option, short = keys[0] if keys else "data", unknown[1].rpartition(".")[2]
        name = short if short in known_parts(option) else unknown[1]
        return f"{'.'.join(keys) or option}: {unknown[2]}; --{option}.help {name} lists its options"
    if value := re.match(r"Problem with given class_path '[^']+': Parser key \"([^\"]+)\": (.+)", mistake):
        keys, mistake = [*keys, value[1]], value[2]
    return f"{'.'.join(keys)}: {mistake}" if keys else mistake


def _wrong_class(text: str) -> str | None:
    """A class that does not exist, with those of a similar name and all others; None where the error is another."""
    option = re.search(r'Parser key "([^"]+)"|--([\w.]+)\.help: ', text)
    missing = re.search(
        r"Expected a dot import path string: (?P<name>\S+)|(?:given class_path '(?P<path>[^']+)'|\.help):\s+"
        r"(?P<reason>module '[^']+' has no attribute '(?P<last>[^']+)'|No module named '[^']+')",
        text,
    )
    if not option or not missing:
        return None
    given, reason, known = missing["name"] or missing["path"], missing["reason"], known_parts(option[1] or option[2])
    what = " ".join(["there is no class", *([given] if given else []), *([f"({reason})"] if reason else [])])
    near = close_names(given.rpartition(".")[2] if given else missing["last"] or "", known)
    remedy = f"did you mean {' or '.join(near)}? " if near else ""
    listed = f"known by name are {', '.join(known)}; any other class is" if known else "write it as"
    return f"{option[1] or option[2]}: {what}; {remedy}{listed} package.module.Class"
