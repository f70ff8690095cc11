"""Preflight of a validate: what it is going to take is said, written down, and refused where it cannot fit."""

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_info

from moeq.checkpoint.loading import load_config, stream_model
from moeq.checkpoint.loading import model_bytes as checkpoint_bytes
from moeq.checkpoint.model_class import model_class
from moeq.checkpoint.placement import Placement, stream_obstacle
from moeq.checkpoint.source_options import source_options
from moeq.disk.atomic import write_json, write_text
from moeq.evaluation.placing import Places, refuse_generation
from moeq.evaluation.preflight import Role, TaskWork, evaluation_phases, measure_pace, probe_shape, task_work
from moeq.forecast import GROWTH, LARGE_MODEL, room_of
from moeq.models.adapter import Adapter
from moeq.models.sizes import model_bytes
from moeq.preflight.limits import check_room
from moeq.preflight.phases import Forecast
from moeq.preflight.tables import forecast_json, forecast_table, summary_line

if TYPE_CHECKING:
    from moeq.module import MoEQuantModule

REMEDIES = {
    "model": ("set --model.placement stream", "evaluate a packed export"),
    "original": ("set --model.reference_mode disk",),
    "activations": ("set a smaller --data.batch_tokens",),
    "logits": ("set a smaller --data.batch_tokens",),
    "hidden states": ("set --model.hidden_gib 0.5",),
    "disk": ("set --trainer.default_root_dir to a larger disk", "set a smaller --data.num_documents"),
}
GIB = 1 << 30


def preflight_validation(module: "MoEQuantModule", places: Places) -> Forecast | None:
    """Say what a validate is going to take.

    Returns:
        None where a model has no blocks of experts, whose shapes the formulas read.

    Raises:
        ValueError: It does not fit, or a streamed model would have to write text.
        SystemExit: ``--model.preflight true``: after the table, which is written.
    """
    refuse_generation(places.model, module.evaluations)
    tasks = [task_work(evaluation, places.without) for evaluation in module.evaluations]
    asked = [task for task in tasks if task.num_tokens]
    roles = _roles(module, places, asked)
    if roles is None:
        return None
    phases = evaluation_phases(
        asked, roles[0], roles[1] if len(roles) > 1 else None, beside=places.mode == "memory",
        hidden_bytes_bound=int(module.hparams["hidden_gib"] * GIB),
    )  # fmt: skip
    process = module.run.meter.process_bytes + GROWTH
    lines = tuple(dict.fromkeys(f"Placement: {placement.reason}." for placement in places.by_role.values()))
    forecast = Forecast(lines, phases, process, module.device.type == "cpu")
    long, stops = any(role.pace for role in roles), module.hparams["preflight"]
    rank_zero_info(forecast_table(forecast) if long or stops else summary_line(forecast))
    check_room(forecast, room_of(module), REMEDIES)
    if stops:
        write_validation_forecast(module, forecast)
        raise SystemExit(0)
    return forecast


def write_validation_forecast(module: "MoEQuantModule", forecast: Forecast) -> None:
    """``preflight_validate.json`` and ``preflight_validate.md``, by the first rank."""
    if module.trainer.is_global_zero:
        write_json(module.run_dir / "preflight_validate.json", forecast_json(forecast))
        write_text(module.run_dir / "preflight_validate.md", forecast_table(forecast))


def _roles(module: "MoEQuantModule", places: Places, tasks: list[TaskWork]) -> list[Role] | None:
    """The model, and the original where there is one."""
    names = {"model": module.hparams["name"], "reference": module.hparams["reference"]}
    try:
        return [_role(module, role, names[role], placement, tasks) for role, placement in places.by_role.items()]
    except ValueError:  # of the adapter: a model without experts
        return None


def _role(module: "MoEQuantModule", role: str, name: str, placement: Placement, tasks: list[TaskWork]) -> Role:
    how = module.hparams["dtype"], module.hparams["compute_dtype"], module.device
    asked = source_options(module.hparams)
    config, streamed = load_config(name, **asked), placement.kind == "stream"
    packed = getattr(config, "quantization_config", None) is not None
    if packed or stream_obstacle(name, **asked) is not None:
        if packed:
            del config.quantization_config
        with torch.device("meta"):
            code = asked["trust_remote_code"]
            adapter = Adapter(model_class(config).from_config(config, dtype=config.dtype, trust_remote_code=code))
        return Role(role, adapter, model_bytes(adapter, streamed=False), checkpoint_bytes(name, *how, **asked))
    model, stream = stream_model(name, *how, **asked)
    adapter = Adapter(model, stream)
    sizes = model_bytes(adapter, streamed=streamed)
    if sizes.total <= LARGE_MODEL or not tasks:
        return Role(role, adapter, sizes, sizes.total)
    rank_zero_info(f"Preflight: measuring one block of {name} ...")
    stream.place(module.device)
    vocabulary = model.config.get_text_config().vocab_size
    ids_BT = torch.arange(torch.Size(probe_shape(tasks)).numel()).remainder(vocabulary).view(probe_shape(tasks))
    return Role(role, adapter, sizes, sizes.total, measure_pace(adapter, ids_BT.to(module.device), sizes.stored[0]))
