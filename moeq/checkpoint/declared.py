"""A model without weights, declared as one that is loaded whole: dtypes of parameters, buffers that no file holds."""

import torch
from transformers import PreTrainedModel


def declare_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Declare the dtypes of parameters that transformers keeps in float32."""
    kept = [*(model._keep_in_fp32_modules_strict or ())] if dtype != torch.float32 else []
    kept += [*(model._keep_in_fp32_modules or ())] if dtype == torch.float16 else []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        # Parts of a path, one or several, as transformers matches them.
        if tensor.is_floating_point() and any(f".{part}." in f".{name}." for part in kept):
            tensor.data = tensor.data.float()


def make_unsaved_buffers(model: PreTrainedModel) -> None:
    """Compute what no file holds (rotary frequencies, slopes) on the CPU, as a model that is loaded whole does."""
    owners = {name.rpartition(".")[0] for name, buffer in model.named_non_persistent_buffers() if buffer.is_meta}
    for path in owners:
        module = model.get_submodule(path)
        for leaf in module._non_persistent_buffers_set:
            buffer = module._buffers[leaf]
            if buffer is not None and buffer.is_meta:
                module._buffers[leaf] = torch.empty_like(buffer, device="cpu")
        model._init_weights(module)
