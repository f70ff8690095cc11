"""Whether a run fits its machine; one that does not is refused with the phase, the number and the way out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from moeq.preflight.phases import Forecast, Phase
from moeq.preflight.tables import size

Resource = Literal["device", "host", "disk"]
_PLACES = {"device": "on the device", "host": "of main memory", "disk": "on the disk of the run folder"}
# Beyond what is counted: for reports, figures and curves, and as much again as is counted, up to a bound.
REPORT_BYTES, SPARE_DISK_BYTES = 1 << 21, 1 << 28


@dataclass(frozen=True)
class Room:
    """What a run may take, in bytes; None where there is no such thing or nothing is known.

    Attributes:
        device: Of the accelerator, all that this process may have.
        host: Of main memory, what this process has already included.
        disk: Free on the disk of the run folder.
    """

    device: int | None
    host: int | None
    disk: int | None


def check_room(forecast: Forecast, room: Room, remedies: Mapping[str, Sequence[str]]) -> None:
    """Refuse a run that cannot fit.

    Args:
        forecast: What it takes.
        room: What there is.
        remedies: Options that make a part smaller, by the name of the part ("Hessians", "model", ..., "disk").

    Raises:
        ValueError: The first phase that does not fit, by how much, what of it is largest, and options that help.
    """
    left = room.disk
    spare = min(SPARE_DISK_BYTES, REPORT_BYTES + sum(phase.disk for phase in forecast.phases))
    for phase in forecast.phases:
        needs: tuple[tuple[Resource, int, int | None], ...] = (
            ("device", forecast.device_bytes(phase), room.device),
            ("host", forecast.host_bytes(phase), room.host),
            ("disk", phase.disk + spare, left),
        )
        for resource, need, available in needs:
            if available is not None and need > available and (resource != "disk" or phase.disk):
                raise ValueError(_refusal(forecast, phase, resource, need, available, remedies))
        left = None if left is None else left - phase.disk


def _refusal(
    forecast: Forecast,
    phase: Phase,
    resource: Resource,
    need: int,
    available: int,
    remedies: Mapping[str, Sequence[str]],
) -> str:
    """Such as "calibrate mlp_in needs 31.2 GB of main memory, which has 24.0 GB: model 20.1 GB, ...; set ..."."""
    if resource == "disk":
        parts, helpful = "", list(remedies.get("disk", ()))
    else:
        moment = forecast.largest_moment([phase])
        held = {**moment.device, **moment.host} if resource == "host" or forecast.on_cpu else dict(moment.device)
        largest = sorted(held.items(), key=lambda item: -item[1])
        parts = ": " + ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in largest[:4] if num_bytes)
        helpful = [option for name, _ in largest for option in remedies.get(name, ())]
    unique = list(dict.fromkeys(helpful))
    remedy = " or ".join(unique[:3]) if unique else "take a larger machine"
    return (
        f"this run does not fit: {phase.kind} ({phase.label}) needs {size(need)} {_PLACES[resource]}, where "
        f"{size(max(available, 0))} are free{parts}; {remedy}"
    )
