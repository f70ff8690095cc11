"""llama.cpp in this process, by the C interface in the wheel of xllamacpp: logits and token ids of a file."""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ROOM = 512  # bytes that a structure may have behind the fields named here
_FLOAT32 = 0


class _Model(ctypes.Structure):
    """Parameters of a model: only the switches in the middle matter."""

    _fields_ = [
        ("devices", ctypes.c_void_p), ("overrides", ctypes.c_void_p), ("layers_on_gpu", ctypes.c_int32),
        ("split", ctypes.c_int32), ("load", ctypes.c_int32), ("lazy", ctypes.c_int32), ("main_gpu", ctypes.c_int32),
        ("tensor_split", ctypes.c_void_p), ("progress", ctypes.c_void_p), ("progress_data", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p), ("vocab_only", ctypes.c_bool), ("rest", ctypes.c_uint8 * _ROOM),
    ]  # fmt: skip


class _Context(ctypes.Structure):
    """Parameters of a context up to the types of its cache."""

    _fields_ = [
        ("tokens", ctypes.c_uint32), ("batch", ctypes.c_uint32), ("micro_batch", ctypes.c_uint32),
        ("counts", ctypes.c_uint32 * 4), ("threads", ctypes.c_int32), ("threads_of_batch", ctypes.c_int32),
        ("kinds", ctypes.c_int32 * 4), ("flash_attention", ctypes.c_int32), ("rope", ctypes.c_float * 6),
        ("yarn_context", ctypes.c_uint32), ("defrag", ctypes.c_float), ("callback", ctypes.c_void_p),
        ("callback_data", ctypes.c_void_p), ("cache_keys", ctypes.c_int32), ("cache_values", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * _ROOM),
    ]  # fmt: skip


class _Batch(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)), ("embedding", ctypes.c_void_p),
        ("position", ctypes.POINTER(ctypes.c_int32)), ("num_sequences", ctypes.POINTER(ctypes.c_int32)),
        ("sequence", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))), ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]  # fmt: skip


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_said: list[str] = []
_listen = _LOG(lambda level, text, data: _said.append(text.decode(errors="replace")))


@cache
def _library() -> Any:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise ImportError("llama.cpp is not installed; pip install xllamacpp")
    library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("*.so"))), mode=ctypes.RTLD_GLOBAL)
    library.llama_model_default_params.restype = _Model
    library.llama_context_default_params.restype = _Context
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Model]
    library.llama_init_from_model.argtypes = [ctypes.c_void_p, _Context]
    for name in ("model_load_from_file", "init_from_model", "model_get_vocab"):
        getattr(library, f"llama_{name}").restype = ctypes.c_void_p
    library.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    library.llama_vocab_n_tokens.argtypes = [ctypes.c_void_p]
    library.llama_tokenize.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32, ctypes.c_bool,
        ctypes.c_bool,
    ]  # fmt: skip
    library.llama_batch_init.restype = _Batch
    library.llama_batch_free.argtypes = [_Batch]
    library.llama_decode.argtypes = [ctypes.c_void_p, _Batch]
    library.llama_get_logits.argtypes = [ctypes.c_void_p]
    library.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    library.llama_synchronize.argtypes = library.llama_free.argtypes = library.llama_model_free.argtypes = [
        ctypes.c_void_p
    ]
    library.llama_log_set(_listen, None)
    library.llama_backend_init()
    return library


def _parts(ids: Tensor, first: int) -> list[tuple[int, Tensor]]:
    """Where tokens begin that are read at once: some, then one after another."""
    starts = [0, *range(first, len(ids))]
    return [(start, ids[start:end]) for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]


class LlamaCpp:
    """A file that llama.cpp has opened; raises RuntimeError with what it said where it refuses."""

    def __init__(self, path: Path, *, vocabulary_only: bool = False) -> None:
        self._library = library = _library()
        parameters = library.llama_model_default_params()
        parameters.vocab_only = vocabulary_only
        _said.clear()
        self._model = library.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise RuntimeError("".join(line for line in _said if "error" in line).strip())
        self._vocabulary = library.llama_model_get_vocab(self._model)

    def logits(self, ids: Tensor, prompt: int | None = None) -> Tensor:
        """Logits of all positions of one sequence, [T, V], with keys and values in float32.

        Args:
            ids: Of the sequence, [T].
            prompt: How many are read at once, the others one by one; None is all.
        """
        library, count = self._library, len(ids)
        parameters = library.llama_context_default_params()
        if (parameters.batch, parameters.cache_keys, parameters.cache_values) != (2048, 1, 1):
            raise RuntimeError("this xllamacpp has another interface than the one written down here; see llama.h")
        parameters.tokens = parameters.batch = parameters.micro_batch = max(count, 32)
        parameters.threads = parameters.threads_of_batch = 1
        parameters.cache_keys = parameters.cache_values = _FLOAT32
        parameters.flash_attention = 0
        context = library.llama_init_from_model(self._model, parameters)
        if not context:
            raise RuntimeError("".join(_said[-5:]).strip())
        first = count if prompt is None else prompt
        found = [self._read(context, part, start) for start, part in _parts(ids, first)]
        library.llama_free(context)
        return torch.cat(found)

    def _read(self, context: Any, ids: Tensor, start: int) -> Tensor:
        """Logits of the next tokens of a sequence, [T, V], of which ``start`` were read."""
        library, count = self._library, len(ids)
        batch = library.llama_batch_init(count, 0, 1)
        batch.count = count
        for place, token in enumerate(ids.tolist()):
            batch.token[place], batch.position[place], batch.logits[place] = token, start + place, 1
            batch.num_sequences[place], batch.sequence[place][0] = 1, 0
        if library.llama_decode(context, batch):
            raise RuntimeError("".join(_said[-5:]).strip())
        shape = (count, library.llama_vocab_n_tokens(self._vocabulary))
        found = torch.from_numpy(np.ctypeslib.as_array(library.llama_get_logits(context), shape).copy())
        library.llama_batch_free(batch)
        return found

    def step_seconds(self, sequences: int, prompt: int, num_tokens: int) -> list[float]:
        """Processor seconds of each of some tokens after a prompt, of several sequences at once, on one thread."""
        return self._seconds(sequences, prompt, num_tokens)[1:]

    def prompt_seconds(self, length: int) -> float:
        """Processor seconds of reading one prompt, on one thread."""
        return self._seconds(1, length, 0)[0]

    def _seconds(self, sequences: int, prompt: int, num_tokens: int) -> list[float]:
        """Processor seconds of a prompt of several sequences, and of each token after it."""
        library = self._library
        parameters = library.llama_context_default_params()
        parameters.tokens = max(256, sequences * 2 * (prompt + num_tokens))
        parameters.batch = parameters.micro_batch = max(32, sequences * prompt)
        parameters.counts[0] = sequences
        parameters.threads = parameters.threads_of_batch = 1
        context = library.llama_init_from_model(self._model, parameters)
        if not context:
            raise RuntimeError("".join(_said[-5:]).strip())
        batch, steps = library.llama_batch_init(sequences * prompt, 0, 1), []
        for start in (0, *range(prompt, prompt + num_tokens)):
            length = prompt if start == 0 else 1
            batch.count = sequences * length
            for place in range(batch.count):
                sequence, position = divmod(place, length)
                batch.token[place], batch.position[place] = 1 + 7 * (place + start) % 997, start + position
                batch.num_sequences[place], batch.sequence[place][0] = 1, sequence
                batch.logits[place] = position == length - 1
            begin = process_time()
            if library.llama_decode(context, batch):
                raise RuntimeError("".join(_said[-5:]).strip())
            library.llama_synchronize(context)
            steps.append(process_time() - begin)
        library.llama_batch_free(batch)
        library.llama_free(context)
        return steps

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text, with what the file says that texts begin and end with where ``special``."""
        raw = text.encode()
        ids = (ctypes.c_int32 * (4 * len(raw) + 8))()
        count = self._library.llama_tokenize(self._vocabulary, raw, len(raw), ids, len(ids), special, True)
        return list(ids[:count])

    def close(self) -> None:
        self._library.llama_model_free(self._model)
