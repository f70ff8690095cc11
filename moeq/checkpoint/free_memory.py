"""How much memory a process can still get, on a device or on the host, within the limits that it was given."""

import os
import resource
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")
# Of a process: its own group of cgroup v2.
GROUPS = Path("/proc/self/cgroup")


def free_bytes(device: torch.device) -> int:
    """Memory that nothing uses yet: of a CUDA device, or of the host as far as this process may take it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min(_of_system(), _of_group(), _of_process()))


def _of_system() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # what the system can hand out, file caches included
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_group() -> int:
    """What the control group of a container or a job leaves; file caches are given back before anything is killed."""
    left = [1 << 62]
    for group in _groups():
        try:
            limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
            fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            if limit != "max":
                left.append(int(limit) - int(used) + int(fields["inactive_file"]) + int(fields["active_file"]))
        except (OSError, ValueError, KeyError):  # not version 2, or not for us to read
            continue
    return min(left)


def _groups() -> list[Path]:
    """Folders of this process's group and of those around it."""
    try:
        path = GROUPS.read_text().splitlines()[-1].rpartition(":")[2].strip("/")
    except (OSError, IndexError):
        return [CGROUP]
    parts = [part for part in path.split("/") if part]
    return [CGROUP.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]


def _of_process() -> int:
    """What ``ulimit -v`` leaves."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not statm.is_file():
        return 1 << 62
    return limit - int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
