"""Tables of names by model family: the stage of each linear, what a block hands on, what is refused.

What stays in full precision is in ``moeq.models.not_quantized``.
"""

from collections.abc import Collection
from typing import Any

from torch import nn

# Where in the data flow of a block the input of a linear arises.
STAGES = ("attention_in", "attention_mid", "attention_out", "mlp_pre", "mlp_in", "mlp_down", "mlp_post")

SHARED_GATE = "shared_expert_gate"
SHARED = frozenset({"shared_expert", "shared_experts", "shared_mlp"})

# Parts of a path inside of which tokens are mixed; a "mixer" may also be a feed-forward block.
TOKEN_MIXERS = frozenset({"self_attn", "linear_attn", "attention", "mamba", "conv"})
ANY_MIXER = "mixer"
# Anything else in a token mixer reads the normalised input of the block ("attention_in").
ATTENTION_MID = frozenset({"q_b_proj", "kv_b_proj", "g_b_proj", "q_gate_proj"})
ATTENTION_OUT = frozenset({"o_proj", "o_b_proj", "out_proj", "dense"})
MLP_PRE = frozenset({"fc1_latent_proj"})
MLP_IN = frozenset({"gate_proj", "up_proj", "w1", "w3", "gate_up_proj", "fc1", "input_linear"})
MLP_DOWN = frozenset({"down_proj", "w2", "fc2", "output_linear"})
MLP_POST = frozenset({"fc2_latent_proj"})


# Decoder blocks that return (hidden states, something that the next block is called with).
HAND_ON = frozenset(
    {
        "ZayaDecoderLayer", "GlmMoeDsaDecoderLayer", "HYV4DecoderLayer", "Glm5NextTextDecoderLayer",
        "MistralLarge4TextDecoderLayer",
    }
)  # fmt: skip

# Families and wrappers whose experts follow the interface, and why they are refused all the same.
REFUSED = {
    "inkling2_text": "its blocks read the outputs of all earlier ones, which are not kept",
    "inkling_mm_model": "its files hold gate and up rows of linears in turn, which packed weights cannot be",
    "ernie4_5_vl_moe": "its files number the experts of text and those of images through, and only text is calibrated",
    "qwen3_omni_moe": "it has no forward pass of text; give a folder with its thinker alone",
    "diffusion_gemma": "it fills in blocks of text and does not predict the next token",
}

# Families whose experts do not follow the interface, and how they differ.
OTHER_EXPERTS = {
    "llama4_text": "every expert runs on every token, and the score multiplies its input",
    "jetmoe": "attention is a mixture as well",
    "doge": "experts are rows of embeddings",
    "longcat_flash": "some experts are the identity",
    "dbrx": "all experts are one 2-D matrix",
}

# Families whose blocks pass on several residual streams: hidden states [B, T, S, D] or [B, T, S * D].
SEVERAL_STREAMS = frozenset({"deepseek_v4", "hy_v4", "qwen4_exp_text", "glm5_next_text"})

# Projections whose output attention averages: values alone, or (True) keys and values of every head, values last.
VALUE_LEAVES = {"v_proj": False, "kv_b_proj": True}


def linear_stage(path: str) -> str | None:
    """Stage (one of ``STAGES``) of a linear; None where the tables do not know."""
    parts = path.split(".")
    leaf = parts[-1]
    mixes = not TOKEN_MIXERS.isdisjoint(parts)
    if not mixes:
        for stage, leaves in (
            ("mlp_pre", MLP_PRE), ("mlp_in", MLP_IN), ("mlp_down", MLP_DOWN), ("mlp_post", MLP_POST)
        ):  # fmt: skip
            if leaf in leaves:
                return stage
    if not mixes and ANY_MIXER not in parts:
        return None
    if leaf in ATTENTION_MID:
        return "attention_mid"
    return "attention_out" if leaf in ATTENTION_OUT else "attention_in"


def shared_gate(sparse_block: nn.Module) -> nn.Module | None:
    """The one-row linear whose sigmoid multiplies the shared expert's output, where the family has one."""
    gate = getattr(sparse_block, SHARED_GATE, None)
    return gate if isinstance(gate, nn.Module) else None


def survey_refusal(config: Any, stages: Collection[str], *, of_output: bool) -> str | None:
    """Why a survey cannot be made of a model; None where it can.

    Args:
        config: Of the model.
        stages: Stages of its sites.
        of_output: The survey measures changes of a block's output, one expert alone.
    """
    if getattr(_text_config(config), "model_type", None) in SEVERAL_STREAMS:
        return "its blocks pass on several residual streams"
    if of_output and "mlp_post" in stages:
        return "a projection stands between its experts and the output of the block; choose fisher or hessian"
    return None


def refusal(config: Any) -> str | None:
    """Why a family, though its experts follow the interface, cannot be run block by block; None where it can."""
    text = _text_config(config)
    for each in (config, text):
        if (family := getattr(each, "model_type", None)) in REFUSED:
            return REFUSED[family]
    if getattr(text, "num_kv_shared_layers", 0) or any(getattr(text, "kv_sharing_modes", None) or ()):
        return "its last blocks read the keys and values of earlier ones, which are not kept"
    return None


def other_experts(config: Any) -> str | None:
    """How the experts of a family differ from the interface; None where that is not known."""
    return OTHER_EXPERTS.get(getattr(_text_config(config), "model_type", ""))


def _text_config(config: Any) -> Any:
    """That of the language model of a wrapper; otherwise the configuration itself."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config
