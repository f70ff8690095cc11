"""A tiny random Llama with a tokenizer like Llama's, made on the spot.

The tokenizer is byte-pair encoding over text whose blanks are letters, with single bytes for what it does not know and
a first token that it adds by itself; it is trained in seconds on texts that ship with the repository.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = Path(__file__).resolve().parents[2] / "assets/reference-moe/texts"
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def llama_like(*, vocabulary: int = 1024, window: int = 512, seed: int = 0) -> tuple[Any, Any]:
    """(model, tokenizer), float32.

    Args:
        vocabulary: Tokens besides the 256 bytes.
        window: Tokens that the model reads.
        seed: Of the weights.
    """
    tokenizer = llama_like_tokenizer(vocabulary)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # Ten times the usual one, with which all tokens would be about equally likely.
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(torch.float32).eval().requires_grad_(False)
    return model, tokenizer


def llama_like_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding with metaspaces, byte fallback and ``<s>`` in front."""
    learner = Tokenizer(models.BPE(unk_token=UNKNOWN))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[UNKNOWN, BEGIN, END], show_progress=False)
    learner.train_from_iterator(_lines(), trainer)
    learned = json.loads(learner.to_str())["model"]
    tokens = [*learned["vocab"], *(byte for byte in BYTES if byte not in learned["vocab"])]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token=UNKNOWN,
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.add_special_tokens([UNKNOWN, BEGIN, END])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[begin]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, unk_token=UNKNOWN)


def _lines() -> Iterator[str]:
    for path in sorted(TEXTS.glob("*.jsonl")):
        for line in path.read_text(encoding="utf8").splitlines()[:200]:
            yield from (text for text in json.loads(line).values() if isinstance(text, str))
    for path in sorted(TEXTS.glob("*.txt")):
        yield path.read_text(encoding="utf8")[:300_000]
