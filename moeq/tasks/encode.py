"""Documents from the rows of a task: token ids, cut to the model's window.

Token for token what lm-evaluation-harness 0.4.13 (HFLM, causal models) gives its model.  A continuation is what the
tokens of ``context + continuation`` have beyond the number of the context's own, blanks at the end of the context being
moved to the continuation first; where a text is longer than the window, its last ``max_length + 1`` tokens are kept.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from moeq.disk.texts import token_stream
from moeq.tasks.documents import Document, Request
from moeq.tasks.prompts import shot_texts
from moeq.tasks.rows import Rows
from moeq.tasks.task import DataRow, Generation, LastWord, MultipleChoice, Rolling, Task, Windows
from moeq.tasks.windows import consecutive_windows, random_windows, rolling_windows, spread

Ids = tuple[int, ...]
# A request, and the tokens that were cut from its left.
Cut = tuple[Request, int]
# What the harness takes for a model that does not say how much it can read.
DEFAULT_MAX_LENGTH = 2048
# A tokenizer that knows no limit says this.
_NO_LIMIT = 1000000000000000019884624838656


def window_of(config: Any, tokenizer: Any) -> int:
    """Tokens that a model can read, as the harness finds out: by its configuration, else by its tokenizer."""
    text_config = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(text_config, name, None) is not None:
            return int(getattr(text_config, name))
    length = getattr(tokenizer, "model_max_length", None)
    return DEFAULT_MAX_LENGTH if length is None or length == _NO_LIMIT else int(length)


class Encoded(NamedTuple):
    """Documents, and how many the task has: more where only some were asked for."""

    documents: list[Document]
    num_available: int


class Encoder:
    """Makes documents.

    Args:
        tokenizer: Of the model.
        max_length: Tokens that the model can read; see ``window_of``.

    Raises:
        ValueError: The tokenizer has neither a begin- nor an end-of-text token.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is None and eos is None:
            raise ValueError(
                "the tokenizer has no bos_token and no eos_token, one of which stands before a text without context; "
                "set one in its tokenizer_config.json"
            )
        self.prefix: int = bos if bos is not None else eos

    def documents(self, task: Task, rows: Rows, *, window_length: int, num_documents: int | None) -> Encoded:
        """Documents of a task.

        Args:
            task: What becomes of a row.
            rows: The rows as they are stored.
            window_length: Tokens of a window of text, for tasks that state none.
            num_documents: So many of them, evenly spread; their ``index`` stays that among all.  None is all.

        Raises:
            ValueError: A document has nothing to score, or does not fit.
        """
        prepared = task.prepare(rows.rows)
        if isinstance(task, Windows):
            return self._windows(task, prepared, task.length or window_length, num_documents)
        prepared = [prepared[i] for i in spread(len(prepared), task.documents)]
        chosen = spread(len(prepared), num_documents)
        wanted = [_checked(task, i, prepared[i]) for i in chosen]
        if isinstance(task, Rolling):
            encoded = self._rolling([task.text(row) for row in wanted])
        else:
            encoded = self._prompted(task, wanted, shot_texts(task, rows, prepared, chosen))
        documents = [_document(task, *each) for each in zip(chosen, wanted, encoded, strict=True)]
        return Encoded(documents, len(prepared))

    def encode(self, texts: Iterable[str], *, special_tokens: bool | None = None) -> dict[str, Ids]:
        """Token ids of distinct texts, in one call of the tokenizer.

        Args:
            texts: Any texts.
            special_tokens: Whether the tokenizer adds its own; None lets it, but to texts that begin with the
                begin-of-text token already.
        """
        start = self.tokenizer.decode(self.prefix)
        adding: dict[bool, list[str]] = {}
        for text in dict.fromkeys(texts):
            add = not text.startswith(start) if special_tokens is None else special_tokens
            adding.setdefault(add, []).append(text)
        ids: dict[str, Ids] = {}
        for add, group in adding.items():
            # verbose=False: no warning that a text is longer than the model's window, since it is cut later.
            options = {"add_special_tokens": add, "return_attention_mask": False, "verbose": False}
            ids.update(zip(group, map(tuple, self.tokenizer(group, **options)["input_ids"]), strict=True))
        return ids

    def _windows(self, task: Windows, rows: Sequence[DataRow], length: int, count: int | None) -> Encoded:
        texts = [task.text(row) for row in rows]
        if task.random_windows is not None:

            def encode(text: str) -> Ids:
                return self._whole(text, special_tokens=task.special_tokens)

            windows_NL = random_windows(texts, encode, length, task.random_windows, task.seed)
        elif task.join is not None:
            text = task.join.join(texts)
            windows_NL = consecutive_windows(
                torch.tensor(self._whole(text, special_tokens=task.special_tokens)), length
            )
        else:
            windows_NL = consecutive_windows(token_stream(texts, self.tokenizer), length)
        windows_NL = windows_NL[spread(len(windows_NL), task.documents)]
        documents = []
        for index in spread(len(windows_NL), count):
            ids = tuple(windows_NL[index].tolist())
            cut = max(len(ids) - self.max_length, 0)
            request = Request(ids[cut : cut + 1], ids[cut + 1 :], open_end=True)
            documents.append(_document(task, index, {}, [(request, cut)]))
        return Encoded(documents, len(windows_NL))

    def _whole(self, text: str, *, special_tokens: bool) -> Ids:
        # verbose=False: no warning that a text is longer than the model's window, since it is cut into windows next.
        return tuple(self.tokenizer.encode(text, add_special_tokens=special_tokens, verbose=False))

    def _rolling(self, texts: Sequence[str]) -> list[list[Cut]]:
        of_text = self.encode(texts)
        return [
            [_fitted(*pair, self.max_length) for pair in rolling_windows(of_text[text], self.prefix, self.max_length)]
            for text in texts
        ]

    def _prompted(self, task: Task, rows: Sequence[DataRow], shots: Sequence[str]) -> list[list[Cut]]:
        if isinstance(task, MultipleChoice | LastWord):
            of_row = [task.pairs(row, text) for row, text in zip(rows, shots, strict=True)]
            encoded = iter(self._pairs([pair for pairs in of_row for pair in pairs]))
            return [[_fitted(*next(encoded), self.max_length) for _ in pairs] for pairs in of_row]
        if isinstance(task, Generation):
            prompts = [text + task.prompt(row) for row, text in zip(rows, shots, strict=True)]
            targets = [task.target(row) for row in rows]
            return [[request] for request in self._prompts(prompts, targets, task.max_new_tokens)]
        raise ValueError(
            f"task {task.name} is a {type(task).__name__}; use MultipleChoice, Cloze, LastWord, Windows, Rolling, "
            "Generation or Code"
        )

    def _pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Ids, Ids]]:
        """Token ids of contexts and continuations."""
        moved = [_blanks_moved(*pair) for pair in pairs]
        with_context = [pair for pair in moved if pair[0]]
        of_text = self.encode([*(pair[0] for pair in with_context), *map("".join, with_context)])
        alone = self.encode([pair[1] for pair in moved if not pair[0]], special_tokens=False)
        encoded = []
        for context, continuation in moved:
            if context:
                before = of_text[context]
                after = of_text[context + continuation][len(before) :]
            else:
                before, after = (self.prefix,), alone[continuation]
                if after[:1] == before:
                    after = after[1:]
            if not before or not after:
                raise ValueError(
                    f"continuation {continuation!r} of {context[-40:]!r} adds no token, so that it has no likelihood; "
                    "leave its row out in the task's prepare"
                )
            encoded.append((before, after))
        return encoded

    def _prompts(self, prompts: Sequence[str], targets: Sequence[str], max_new_tokens: int) -> list[Cut]:
        """Prompts that leave room for new tokens, and the right texts as far as they fit."""
        room = self.max_length - max_new_tokens
        if room < 1:
            raise ValueError(
                f"max_new_tokens ({max_new_tokens}) must be less than the model's window of {self.max_length} tokens; "
                "choose a smaller one in the task"
            )
        wholes = list(map("".join, zip(prompts, targets, strict=True)))
        of_text = self.encode([*prompts, *wholes])
        encoded = []
        for prompt, whole in zip(prompts, wholes, strict=True):
            before = of_text[prompt] or (self.prefix,)
            kept = before[-room:]
            # Where there is no right text, models are compared on the prompt's next token.
            after = of_text[whole][len(of_text[prompt]) :] or (self.prefix,)
            encoded.append((Request(kept, after[: self.max_length + 1 - len(kept)]), len(before) - len(kept)))
        return encoded


def _checked(task: Task, index: int, row: DataRow) -> DataRow:
    """A row that has the fields of its task, and a right answer among its choices: known before anything is run."""
    try:
        if isinstance(task, MultipleChoice):
            answer, num_choices = task.answer(row), len(task.pairs(row))
            if not 0 <= answer < num_choices:
                raise ValueError(f"answer {answer} is none of {num_choices} choices, which count from 0")
        elif isinstance(task, LastWord):
            task.pairs(row)
        elif isinstance(task, Rolling):
            task.text(row), task.original(row)
        elif isinstance(task, Generation):
            task.shot(row)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        problem = f"document {index}, with the fields {sorted(row)}, cannot be read ({type(error).__name__}: {error})"
        raise ValueError(f"{problem}; correct the file, or the functions of the task") from error
    return row


def _blanks_moved(context: str, continuation: str) -> tuple[str, str]:
    stripped = context.rstrip()
    # A context of nothing but blanks stays an empty text, as in the harness.
    return stripped, context[len(stripped) :] + continuation


def _fitted(context: Ids, continuation: Ids, max_length: int) -> Cut:
    """The last ``max_length + 1`` tokens, the first of which is context, and how many were cut."""
    cut = max(len(context) + len(continuation) - max_length - 1, 0)
    if cut < len(context):
        return Request(context[cut:], continuation), cut
    whole = context + continuation
    return Request(whole[cut : cut + 1], whole[cut + 1 :]), cut


def _document(task: Task, index: int, row: DataRow, cuts: Sequence[Cut]) -> Document:
    requests = tuple(request for request, _ in cuts)
    num_cut = max((cut for _, cut in cuts), default=0)
    return Document(index, _key(task, row, requests), row, tuple(task.groups(row)), requests, num_cut)


def _key(task: Task, row: DataRow, requests: Sequence[Request]) -> str:
    """SHA-256 over the task, the row, its tokens, and what a generated text is limited by."""
    limits = [list(task.stop), task.max_new_tokens] if isinstance(task, Generation) else []
    tokens = [[request.context, request.continuation, request.open_end] for request in requests]
    parts = [task.name, dict(task.metrics), limits, dict(row), tokens]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
