"""Tiny random models of each family: seconds on a CPU, every code path of the real ones.

Shapes: hidden 64, expert width 32, 2 blocks, 8 experts of which 2 are chosen, 4 heads of 16, 264 tokens.
``tiny_model("mixtral")`` gives the module; ``save_tiny("mixtral", folder)`` writes a Hugging Face folder with a
byte-level tokenizer, on which ``main.py fit`` runs.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerFast

from moeq.checkpoint.model_class import model_class
from tests.families import FAMILIES, REFUSED, REFUSED_WRAPPERS, WRAPPERS

END_OF_TEXT = "<|endoftext|>"
_COMMON: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# The families of most tests; ``tests/test_families.py`` takes all of them.
MOE_FAMILIES = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss")


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of ``tiny_model``."""
    if family in WRAPPERS or family in REFUSED_WRAPPERS:
        values = copy.deepcopy(WRAPPERS.get(family) or REFUSED_WRAPPERS[family][0])
        text = {**_COMMON, **values.pop("text_config"), **overrides}
        return CONFIG_MAPPING[family](text_config=text, **values)
    values = REFUSED[family][0] if family in REFUSED else FAMILIES.get(family, {})
    return CONFIG_MAPPING[family](**{**_COMMON, **values, **overrides})


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    """A random model of ``family`` in eval mode, its parameters frozen.

    Args:
        family: A key of ``FAMILIES`` or ``REFUSED`` in ``tests.families``, or ``llama``, the dense one.
        seed: Seed of the weights.
        dtype: Dtype of the parameters.
        **overrides: Values of the configuration, for example ``num_hidden_layers=3``.
    """
    config = tiny_config(family, **overrides)
    # Not ``model.to(dtype)``, which would round the rotary frequencies too; ``from_pretrained`` does not.
    model = model_class(config).from_config(config, dtype=dtype)
    model.config.architectures = [type(model).__name__]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # The initialisation of the library (0.02) gives nearly uniform routers and logits; this one does not.
        for name, tensor in [*model.named_parameters(), *_correction_biases(model)]:
            noise = torch.randn(tensor.shape, generator=generator) * (0.15 if tensor.ndim >= 2 else 0.05)
            around_one = "norm" in name or name.endswith("_scale")
            tensor.copy_(1 + noise if around_one else noise)
        for name, table in model.named_buffers():
            if name.endswith("tid2eid"):  # zero unless filled: one expert for all, several times
                chances = torch.rand(len(table), config.n_routed_experts, generator=generator)
                table.copy_(chances.topk(table.shape[1]).indices)
    return model.eval().requires_grad_(False)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: ids 1 to 256, after ``<|endoftext|>`` which is 0."""
    vocabulary = {token: i for i, token in enumerate([END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def save_tiny(
    family: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **overrides: Any
) -> Path:
    """Write a tiny model and its tokenizer as a Hugging Face folder; returns ``folder``."""
    tiny_model(family, seed=seed, dtype=dtype, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _correction_biases(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The buffers that DeepSeek's and other routers add before the choice; zero (so: untested) unless filled."""
    endings = ("e_score_correction_bias", "expert_bias")
    return [(name, buffer) for name, buffer in model.named_buffers() if name.endswith(endings)]
