"""Documents hold the tokens that lm-evaluation-harness gives its model, for tokenizers of both kinds."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moeq.tasks.encode import Encoder, window_of
from moeq.tasks.rows import Rows
from moeq.tasks.task import Cloze, DataRow, Generation, LastWord, MultipleChoice, Rolling, Source, Task, Windows
from tests.tiny import tiny_model, tiny_tokenizer

SOURCE = Source("none", hub=None)
PAIRS = [
    ("a cat sat", " on the mat"), ("a cat sat  ", "on"), ("", "the cat"), ("", "<s>the cat"), ("<s>a cat", " sat"),
    ("a", "b"), ("sat\n", "\n on"), ("a cat sat on the mat and the cat sat", " on a mat"), (" a", " cat\n"),
    ("the mat", " a cat sat on the mat and sat and sat"), ("<|endoftext|>the", " cat"),
]  # fmt: skip


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama's: <s> in front, blanks as part of the next word, merges across them, bytes for the rest."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"acehmnost"]
    merges = [("\u2581", "a"), ("a", "t"), ("c", "at"), ("\u2581", "cat"), ("s", "at"), ("t", "h"), ("th", "e"),
              ("\u2581", "the"), ("\u2581", "\u2581"), ("o", "n")]  # fmt: skip
    pieces += ["".join(merge) for merge in merges]
    bpe = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "metaspace": metaspace_tokenizer,
    "bytes": tiny_tokenizer,
}


def rows_of(rows: Sequence[DataRow]) -> Rows:
    return Rows(list(rows), [], "validation", "memory", "")


def documents(task: Task, rows: Sequence[DataRow], tokenizer: Any, max_length: int, count: int | None = None) -> Any:
    made = Encoder(tokenizer, max_length).documents(task, rows_of(rows), window_length=8, num_documents=count)
    return made.documents


def last_word(**options: Any) -> LastWord:
    return LastWord(name="x", source=SOURCE, context=lambda row: row["c"], target=lambda row: row["t"], **options)


@pytest.fixture(params=sorted(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


@pytest.fixture
def harness(tokenizer: Any) -> Callable[[int], Any]:
    """HFLM of a tiny model, which keeps the tokens of its requests instead of running them."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")

    def make(max_length: int) -> Any:
        model = tiny_model("mixtral", vocab_size=300)
        lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, max_length=max_length, device="cpu", batch_size=1)
        lm.kept = []

        def keep(requests: Any, **_: Any) -> list[tuple[float, bool]]:
            lm.kept += [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
            return [(0.0, False)] * len(requests)

        lm._loglikelihood_tokens = keep
        return lm

    return make


@pytest.mark.parametrize("max_length", [8, 12, 512])
def test_continuations_are_the_harness_tokens(max_length: int, tokenizer: Any, harness: Callable[[int], Any]) -> None:
    lm = harness(max_length)
    lm.loglikelihood([SimpleNamespace(args=pair) for pair in PAIRS], disable_tqdm=True)
    made = documents(last_word(), [{"c": c, "t": t} for c, t in PAIRS], tokenizer, max_length)
    for (context, continuation), document in zip(lm.kept, made, strict=True):
        (request,) = document.requests
        seen = (context + continuation)[-(max_length + 1) :]
        assert request.context + request.continuation == seen
        assert request.continuation == continuation[-max_length:]
        assert document.num_cut == len(context + continuation) - len(seen)


@pytest.mark.parametrize("max_length", [4, 7, 512])
def test_rolling_windows_are_the_harness_windows(
    max_length: int, tokenizer: Any, harness: Callable[[int], Any]
) -> None:
    texts = ["the cat sat on the mat and sat", "a", "", "<s>the mat", "on the mat \n\n", "cat" * 4, "catcat" * 7]
    lm = harness(max_length)
    task = Rolling(name="x", source=SOURCE, text=lambda row: row["t"], original=lambda row: row["t"])
    for text, document in zip(texts, documents(task, [{"t": t} for t in texts], tokenizer, max_length), strict=True):
        lm.kept.clear()
        lm.loglikelihood_rolling([SimpleNamespace(args=(text,))], disable_tqdm=True)
        expected = [(context, continuation) for context, continuation in lm.kept]
        assert [(request.context, request.continuation) for request in document.requests] == expected
        assert document.num_cut == 0


def test_prompts_of_generation_are_the_harness_prompts(tokenizer: Any, harness: Callable[[int], Any]) -> None:
    prompts = ["a cat sat on the mat ", "the", "<s>on the mat"]
    task = Generation(
        name="x", source=SOURCE, prompt=lambda row: row["p"], target=lambda row: row["t"], stop=("\n",),
        max_new_tokens=6, score_text=lambda row, text: {}, metrics={},
    )  # fmt: skip
    rows = [{"p": prompt, "t": target} for prompt, target in zip(prompts, [" cat", "", " sat" * 9], strict=True)]
    lm = harness(16)
    for prompt, row, document in zip(prompts, rows, documents(task, rows, tokenizer, 16), strict=True):
        expected = tuple(lm.tok_batch_encode([prompt], left_truncate_len=10)[0][0].tolist())
        (request,) = document.requests
        assert request.context == expected
        assert len(expected) + document.num_cut == lm.tok_batch_encode([prompt])[0].numel()
        whole = tuple(lm.tok_encode(prompt + row["t"]))[len(lm.tok_encode(prompt)) :]
        assert request.continuation == (whole or (tokenizer.bos_token_id,))[: 17 - len(expected)]


@pytest.mark.parametrize("limits", [{"max_position_embeddings": 77}, {"n_positions": 5, "n_ctx": 6}, {}])
def test_windows_of_models_are_the_harness_ones(limits: dict[str, int], tokenizer: Any) -> None:
    resolve = pytest.importorskip("lm_eval.models.utils").resolve_max_length
    for config in (SimpleNamespace(**limits), SimpleNamespace(text_config=SimpleNamespace(**limits), n_ctx=3)):
        assert window_of(config, tokenizer) == resolve(config, tokenizer)
    tokenizer.model_max_length = 99
    assert window_of(SimpleNamespace(), tokenizer) == resolve(SimpleNamespace(), tokenizer) == 99


def test_all_choices_of_a_row_and_all_contexts_of_a_cloze_become_requests() -> None:
    tokenizer = tiny_tokenizer()
    row = {"choices": ["he", "the cat"], "answer": 1}
    values: dict[str, Any] = {
        "name": "x", "source": SOURCE, "choices": lambda row: row["choices"], "answer": lambda row: row["answer"]
    }  # fmt: skip
    choice = MultipleChoice(context=lambda row: "Who?", groups=lambda row: ("a", "b"), **values)
    (document,) = documents(choice, [row], tokenizer, 64)
    assert [tokenizer.decode(list(request.continuation)) for request in document.requests] == [" he", " the cat"]
    assert [tokenizer.decode(list(request.context)) for request in document.requests] == ["Who?", "Who?"]
    assert (document.groups, document.row) == (("a", "b"), row)
    (document,) = documents(Cloze(ending=lambda row: "sat.", **values), [row], tokenizer, 64)
    assert [tokenizer.decode(list(request.context)) for request in document.requests] == ["he", "the cat"]
    assert {tokenizer.decode(list(request.continuation)) for request in document.requests} == {" sat."}


def test_fewer_documents_are_spread_and_keep_their_numbers_and_keys() -> None:
    rows = [{"c": f"context {i}", "t": " end"} for i in range(10)]
    everything = documents(last_word(), rows, tiny_tokenizer(), 64)
    some = documents(last_word(), rows, tiny_tokenizer(), 64, count=4)
    assert [document.index for document in some] == [0, 2, 5, 7]
    assert some == [everything[document.index] for document in some]
    defined_on_five = documents(last_word(documents=5), rows, tiny_tokenizer(), 64)
    assert [document.row["c"][-1] for document in defined_on_five] == ["0", "2", "4", "6", "8"]
    assert [document.index for document in defined_on_five] == [0, 1, 2, 3, 4]
    encoder = Encoder(tiny_tokenizer(), 64)
    assert encoder.documents(last_word(), rows_of(rows), window_length=8, num_documents=4).num_available == 10


def test_keys_tell_apart_what_gives_other_results() -> None:
    row = {"c": "context", "t": " end"}
    keys = {
        documents(last_word(), [row], tiny_tokenizer(), 64)[0].key,
        documents(last_word(), [{**row, "t": " ent"}], tiny_tokenizer(), 64)[0].key,
        documents(last_word(), [row], tiny_tokenizer(), 8)[0].key,
        documents(last_word(metrics={"acc": "mean"}), [row], tiny_tokenizer(), 64)[0].key,
        documents(last_word(), [{**row, "more": 1}], tiny_tokenizer(), 64)[0].key,
    }
    assert len(keys) == 5
    assert documents(last_word(), [dict(row)], tiny_tokenizer(), 64)[0].key in keys


def test_windows_of_a_running_text_are_consecutive() -> None:
    tokenizer, rows = tiny_tokenizer(), [{"text": "abcdefg"}, {"text": "hijkl"}, {"text": "mnopqrstuv"}]
    ended = documents(Windows(name="w", source=SOURCE), rows, tokenizer, 64)
    joined = documents(Windows(name="w", source=SOURCE, join="--", length=5), rows, tokenizer, 64)
    texts = [
        [tokenizer.decode([*d.requests[0].context, *d.requests[0].continuation]) for d in made]
        for made in (ended, joined)
    ]
    assert texts[0] == ["abcdefg<|endoftext|>", "hijkl<|endoftext|>mn", "opqrstuv"]
    assert texts[1] == ["abcde", "fg--h", "ijkl-", "-mnop", "qrstu"]
    assert all(d.requests[0].open_end and len(d.requests[0].context) == 1 for d in (*ended, *joined))


def test_a_window_beyond_the_models_is_cut_and_counted() -> None:
    (document, *_) = documents(
        Windows(name="w", source=SOURCE, length=10), [{"text": "abcdefghijklm"}], tiny_tokenizer(), 6
    )
    (request,) = document.requests
    assert tiny_tokenizer().decode([*request.context, *request.continuation]) == "efghij"
    assert document.num_cut == 4


def test_tokenizers_and_tasks_without_what_is_needed_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=r"continuation '' of 'context' adds no token"):
        documents(last_word(), [{"c": "context", "t": ""}], tokenizer, 64)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no bos_token and no eos_token"):
        Encoder(tokenizer, 64)
