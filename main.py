"""moeq: post-training quantization of Mixture-of-Experts language models.

python main.py fit --config configs/moequant_w3.yaml            calibrate, allocate bits, quantize, export, verify
python main.py validate --config configs/eval.yaml              evaluate an original model or an export
"""

import gc
import os
import sys
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

HELP = """\
commands (each has its own --help, which lists all callbacks and datamodules, one line each):
  fit         quantize a model; writes a run folder (--trainer.default_root_dir) with the export and a report
  validate    evaluate a model on tasks: perplexity, accuracy, generation; divergence from --model.reference

options of one callback or datamodule, by its class name, which is also its class_path in a configuration:
  python main.py fit --trainer.callbacks.help GPTQ
  python main.py fit --data.help EBSSDataModule

most used options (after --config FILE):
  --model.name NAME         hub id or folder; --model.reference NAME: the original, for validate
  --model.bits N            1 to 8; --model.group_size N; --model.affinity_power 0|1|2
  --data.tasks '[mmlu]'     tasks of validate (docs/tasks.md); --data.data_dir DIR; --data.num_documents N
  --trainer.devices N       with --trainer.strategy moeq_ddp: several ranks
  --print_config            show the whole configuration and stop

MOEQ_DEBUG=1 in the environment shows the traceback behind an error.
"""

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType


def main(args: "ArgsType" = None) -> None:
    """Run one command; what a user can mend ends with one line, without a traceback (MOEQ_DEBUG=1 shows it)."""
    given = sys.argv[1:] if args is None else args
    if not given or given in (["-h"], ["--help"]):
        # Answered here, as importing torch and lightning takes seconds.
        sys.stdout.write(f"{__doc__}\n{HELP}")
        return
    from moeq.cli import MoEQuantCLI
    from moeq.mistakes import one_line

    import_parts()
    if args is None:
        gc.freeze()  # what was imported stays; the search for cycles after every block need not look at it
    try:
        MoEQuantCLI.run(args)
    except Exception as error:
        line = one_line(error)
        if line is None or os.environ.get("MOEQ_DEBUG"):
            raise
        sys.exit(f"moeq: {line}")


def import_parts() -> None:
    """Import all of ``callbacks`` and ``datamodules``: the parser knows by name alone what is imported."""
    for package in ("callbacks", "datamodules"):
        for module in iter_modules(import_module(package).__path__, f"{package}."):
            import_module(module.name)


if __name__ == "__main__":
    main()
