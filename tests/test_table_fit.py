"""A fit on grids by tables, from options to a file that llama.cpp runs."""

import json
from pathlib import Path

import pytest

from callbacks.bit_allocation import BitAllocation
from callbacks.export import Export
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from callbacks.learned_rounding import LearnedRounding
from moeq.allocation.patterns import Pattern
from moeq.export.moeq_format import read_quantized
from tests.formats.gguf_models import IDS, divergence, transformers_logits
from tests.formats.llama_cpp import LlamaCpp
from tests.test_two_level_fit import fit
from tests.two_level import save_wide

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


@pytest.mark.slow
def test_a_solved_model_is_exported_packed_and_as_gguf_and_llama_cpp_computes_with_its_values(tmp_path: Path) -> None:
    model = save_wide(tmp_path / "model")
    patterns = [Pattern("*.self_attn.*", grid="mxfp4"), Pattern("*.o_proj", grid="q4_k")]
    steps = [BitAllocation(patterns=patterns), HessianCalibration(), GPTQ(), Export(formats=["moeq", "gguf"])]
    fit(steps, model, tmp_path / "run", grid="iq4_nl")
    kinds = {weight.kind for weight in read_quantized(tmp_path / "run/export").values()}
    assert kinds == {"iq4_nl", "mxfp4", "q4_k"}
    report = json.loads((tmp_path / "run/verification.json").read_text())
    assert report["checkpoint"]["logits_equal"]
    assert report["gguf"]["largest_error"] == 0.0
    assert {"IQ4_NL", "MXFP4", "Q4_K"} <= report["gguf"]["types"].keys()
    (path,) = (tmp_path / "run").rglob("*.gguf")
    file = LlamaCpp(path)
    found, same = file.logits(IDS), transformers_logits(tmp_path / "run/export")
    file.close()
    # llama.cpp rounds activations to 8 bits.
    assert divergence(same, found) < 0.01
    assert divergence(transformers_logits(model), same) > 3 * divergence(same, found)


def test_what_cannot_be_done_on_a_table_is_refused_before_any_work(tmp_path: Path) -> None:
    model = save_wide(tmp_path / "model")
    steps = [BitAllocation(), HessianCalibration(), GPTQ(), LearnedRounding(num_steps=1)]
    with pytest.raises(ValueError, match="LearnedRounding moves evenly spaced levels"):
        fit(steps, model, tmp_path / "run", grid="iq4_nl")
    with pytest.raises(ValueError, match="a grid of compressed-tensors and gguf"):
        fit(
            [BitAllocation(), HessianCalibration(), GPTQ(), Export(formats=["mlx"])],
            model,
            tmp_path / "run",
            grid="mxfp4",
        )
