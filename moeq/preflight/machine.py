"""What the machine lets a process have: main memory under its limits, the accelerator, and the disk."""

import shutil
from contextlib import suppress
from pathlib import Path

import torch

from moeq.preflight.limits import Room
from moeq.preflight.meter import resident_bytes

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def room_of(device: torch.device, folder: Path) -> Room:
    """What a run may take from here on, with what this process holds already."""
    on_device = None
    if device.type == "cuda":
        on_device = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = free_host_bytes()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return Room(on_device, None if free is None else free + resident_bytes(), shutil.disk_usage(existing).free)


def free_host_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """Main memory that this process may still take; None where the system does not say.

    The least of what the system can hand out, what a control group leaves, and what ``ulimit -v`` leaves.  Caches of
    files count as free: the system drops them.
    """
    bounds = []
    with suppress(OSError, KeyError, ValueError):
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        bounds.append(int(fields["MemAvailable"].split()[0]) * 1024)
    with suppress(OSError, KeyError, ValueError):  # "max" is no limit
        limit = int((cgroup / "memory.max").read_text())
        counts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        bounds.append(limit - int(counts["anon"]) - int(counts.get("slab_unreclaimable", 0)))
    with suppress(ImportError, OSError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            bounds.append(limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize())
    return max(0, min(bounds)) if bounds else None
