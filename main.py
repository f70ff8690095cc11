"""moeq: post-training quantization of Mixture-of-Experts language models.

python main.py fit --config configs/moequant_w3.yaml            calibrate, allocate bits, quantize, export, verify
python main.py validate --config configs/eval.yaml              evaluate an original model or an export
"""

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType


def main(args: "ArgsType" = None) -> None:
    """Run one command; a mistake of the user's ends with one line, without a traceback (MOEQ_DEBUG=1 shows it)."""
    from moeq.cli import MoEQuantCLI

    try:
        MoEQuantCLI.run(args)
    except ValueError as error:
        if os.environ.get("MOEQ_DEBUG"):
            raise
        sys.exit(f"moeq: {error}")


if __name__ == "__main__":
    main()
