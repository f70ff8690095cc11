"""Phases of a run: what each holds at its worst moment, adds to the disk, and how long it lasts.

A phase passes through *moments*.  What is held at one moment adds up, what is held at different ones does not: the peak
of a phase is that of its largest moment,

    device = what lies where the model computes
    host   = process + what lies in main memory in any case (+ the same as device where that is the CPU)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Moment:
    """What is held at one time, in bytes by name.

    Attributes:
        device: Where the model computes.
        host: In main memory, wherever the model computes.
    """

    device: Mapping[str, int]
    host: Mapping[str, int] = field(default_factory=dict)

    def host_bytes(self, on_cpu: bool) -> int:
        """Bytes in main memory, without the process itself."""
        return sum(self.host.values()) + (sum(self.device.values()) if on_cpu else 0)

    def device_bytes(self, on_cpu: bool) -> int:
        """Bytes on the accelerator; 0 where there is none."""
        return 0 if on_cpu else sum(self.device.values())


@dataclass(frozen=True)
class Phase:
    """One piece of work.

    Attributes:
        kind: What the table calls it, such as "calibrate mlp_in"; pieces of one kind share a row.
        label: Which of its kind, such as "block 3 mlp_in"; measured and expected meet by it.
        moments: At least one.
        disk: Bytes that it leaves in the run folder.
        seconds: How long it lasts; None where nothing was measured.
    """

    kind: str
    label: str
    moments: tuple[Moment, ...]
    disk: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class Row:
    """All phases of one kind: the largest peaks, the sums of disk and time."""

    kind: str
    count: int
    device: int
    host: int
    disk: int
    seconds: float | None
    parts: Mapping[str, int]


@dataclass(frozen=True)
class Forecast:
    """What a run is going to take.

    Attributes:
        lines: What will happen, in sentences: placement and why, passes, who writes the data.
        phases: In their order.
        process: Bytes of the process by itself: interpreter, libraries, and no tensor of the model.
        on_cpu: Whether the model computes in main memory.
    """

    lines: tuple[str, ...]
    phases: tuple[Phase, ...]
    process: int
    on_cpu: bool

    def host_bytes(self, phase: Phase) -> int:
        """Peak of a phase in main memory."""
        return self.process + max(moment.host_bytes(self.on_cpu) for moment in phase.moments)

    def device_bytes(self, phase: Phase) -> int:
        """Peak of a phase on the accelerator."""
        return max(moment.device_bytes(self.on_cpu) for moment in phase.moments)

    def rows(self) -> list[Row]:
        """One row for each kind, in the order in which kinds first come."""
        by_kind: dict[str, list[Phase]] = {}
        for phase in self.phases:
            by_kind.setdefault(phase.kind, []).append(phase)
        return [self._row(kind, phases) for kind, phases in by_kind.items()]

    def total(self) -> Row:
        """The whole run."""
        return self._row("whole run", self.phases)

    def largest_moment(self, phases: Iterable[Phase]) -> Moment:
        """The moment of some phases that takes most: of the accelerator where there is one."""
        moments = [moment for phase in phases for moment in phase.moments]
        return max(moments, key=lambda moment: (moment.device_bytes(self.on_cpu), moment.host_bytes(self.on_cpu)))

    def _row(self, kind: str, phases: Sequence[Phase]) -> Row:
        worst = self.largest_moment(phases)
        seconds = [phase.seconds for phase in phases if phase.seconds is not None]
        return Row(
            kind=kind,
            count=len(phases),
            device=max(self.device_bytes(phase) for phase in phases),
            host=max(self.host_bytes(phase) for phase in phases),
            disk=sum(phase.disk for phase in phases),
            seconds=sum(seconds) if seconds else None,
            parts={**worst.device, **worst.host},
        )
