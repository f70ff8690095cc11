"""Time the GPTQ solve of llm-compressor or GPTQModel on saved tensors, in that project's own environment.

    python benchmarks/speed/solve_peers.py llm-compressor tensors.pt

``--peer`` of ``solve.py`` calls this with the environment's interpreter; nothing of moeq is imported.  The last line of
the output is JSON: wall and processor seconds of one expert (gate, up and down), per repeat.
"""

import copy
import json
import sys
import time
from collections.abc import Callable

import torch

Linear = dict[str, torch.Tensor]  # weight [E, O, I], inputs [T, I], hessian [I, I]


def llm_compressor(linear: Linear) -> Callable[[], object]:
    """``quantize_weight`` on gate and up as one batch, which it offers, or on down."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    args = QuantizationArgs(num_bits=4, symmetric=True, strategy="channel")
    weight, experts = linear["weight"], len(linear["weight"])
    scale = weight.abs().amax(2, keepdim=True) / 7
    zero_point = torch.zeros_like(scale, dtype=torch.int8)
    hessian = linear["hessian"].expand(experts, -1, -1).contiguous()
    return lambda: quantize_weight(weight.clone(), hessian.clone(), scale, zero_point, None, args)


def gptqmodel(linear: Linear) -> Callable[[], object]:
    """``GPTQ.quantize`` on each linear, after its own ``add_batch``."""
    from gptqmodel.quantization import GPTQ, QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=-1, sym=True, desc_act=False, act_group_aware=False)
    solvers = []
    for weight in linear["weight"]:
        module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        module.weight.data.copy_(weight)
        solver = GPTQ(module, qcfg=copy.deepcopy(config))
        solver.quantizer.configure(perchannel=True)
        solver.add_batch(linear["inputs"].unsqueeze(0), None)
        solver.finalize_hessian()
        solvers.append(solver)
    return lambda: [solver.quantize() for solver in solvers]


def main() -> None:
    """Time every linear of the file, the first repeat left out."""
    solver = {"llm-compressor": llm_compressor, "gptqmodel": gptqmodel}[sys.argv[1]]
    linears = torch.load(sys.argv[2])
    rows = []
    for _ in range(4):
        works = [solver(linear) for linear in linears]
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.no_grad():
            for work in works:
                work()
        rows.append({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu})
    print(json.dumps(rows[1:]))


if __name__ == "__main__":
    main()
