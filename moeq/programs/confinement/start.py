"""The life of a program's process: layer upon layer of confinement, then the program, then a report that it ended.

A request comes on standard input; reports go to the pipe that it names, each line behind a random token:
``ready`` with the layers that took effect, then ``passed`` only after the program's last line, or what stopped it.

With a process namespace there are three processes: this one outside of it, the first one inside, whose end is the
end of all others inside, and the program.  Without, this one becomes the program.
"""

import _signal  # type: ignore[import-not-found]  # signal itself imports enum: a third of the start-up time
import marshal
import os
import resource
import sys

from moeq.programs.confinement.kernel import (
    die_with_parent,
    drop_capabilities,
    forbid_new_privileges,
    hide_memory,
    works,
)
from moeq.programs.confinement.landlock import restrict_files
from moeq.programs.confinement.namespaces import DEVICES, enter_namespaces, make_private_root, readable_paths
from moeq.programs.confinement.seccomp import forbid_calls

# Importing typing would take a quarter of the start-up time.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_REPORT = 3
_UNUSED_USERS = 1 << 30  # far above the ids of users and of their containers
_OVERTIME = 5.0  # seconds after which the namespace ends by itself, should the process that watches it be gone


def main() -> None:
    """Read the request, confine this process, run the program; never returns."""
    request = marshal.loads(sys.stdin.buffer.read())
    os.dup2(request["report"], _REPORT, inheritable=False)
    os.closerange(_REPORT + 1, max(request["report"], _REPORT) + 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    wanted = frozenset(request["layers"])
    works(die_with_parent)
    if os.getppid() != request["parent"]:
        os._exit(1)
    given = enter_namespaces(wanted)
    # Not before: the files by which a user namespace is set up would be root's.
    works(hide_memory)
    if "process namespace" in given:
        _fork_and_wait()
        os.setsid()
    given += _confine(request, wanted, given)
    if "process namespace" in given:
        _signal.signal(_signal.SIGALRM, lambda *_: os._exit(1))
        _signal.setitimer(_signal.ITIMER_REAL, request["seconds"] + _OVERTIME)
        _fork_and_wait()
        os.setsid()
    given += _limit(request, given)
    if "seccomp" in wanted and "no new privileges" in given and forbid_calls(os.getpid()):
        given.append("seccomp")
    os.write(_REPORT, request["token"] + b" ready " + ",".join(given).encode() + b"\n")
    _run(request["program"], request["token"])


def _fork_and_wait() -> None:
    """Go on in a child; the parent only passes on how the child ends."""
    child = os.fork()
    if child:
        os.close(_REPORT)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(status if status >= 0 else 128 - status)


def _confine(request: "dict[str, Any]", wanted: frozenset[str], given: list[str]) -> list[str]:
    """Take away files and rights from this process and its children; returns the layers that took effect."""
    layers = []
    folder = request["folder"]
    private = "mount namespace" in given and "private file system" in wanted
    if private and make_private_root(folder, request["disk_bytes"]):
        layers.append("private file system")
        folder = "/tmp"
    os.chdir(folder)
    os.environ["HOME"] = os.environ["TMPDIR"] = folder
    if "own user" in wanted and _become_unused_user(folder):
        layers.append("own user")
    # A change of user undoes both.
    works(die_with_parent)
    works(hide_memory)
    if "no capabilities" in wanted and works(drop_capabilities):
        layers.append("no capabilities")
    if "no new privileges" in wanted and works(forbid_new_privileges):
        layers.append("no new privileges")
        if "landlock" in wanted and restrict_files([*readable_paths(), *DEVICES], [folder, os.devnull]):
            layers.append("landlock")
    return layers


def _become_unused_user(folder: str) -> bool:
    """Root only: change to a user id that nobody has, so that limits and rights are those of a stranger."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    user = _UNUSED_USERS + int.from_bytes(os.urandom(3))
    try:
        os.chown(folder, user, user)
        os.setgroups([])
        os.setegid(user)
        os.seteuid(user)
        # An interpreter in root's home, say, cannot be read by others.
        readable = os.access(os.__file__, os.R_OK, effective_ids=True) and os.access(
            folder, os.W_OK, effective_ids=True
        )
        os.seteuid(0)
        os.setegid(0)
        if not readable:
            os.chown(folder, 0, 0)
            return False
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    except OSError:
        return False
    return True


def _counts_processes_alone(given: list[str]) -> bool:
    """Whether the kernel's count of this user's processes is that of this program; it never binds root."""
    if "own user" in given:
        return True
    # Before Linux 5.14 a user namespace shared the count of its user.
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2] if part.isdigit())
    return "user namespace" in given and os.getuid() != 0 and release >= (5, 14)


def _limit(request: "dict[str, Any]", given: list[str]) -> list[str]:
    """Set the limits of this process; returns those that took effect."""
    limits = {
        "processor time limit": (resource.RLIMIT_CPU, request["cpu_seconds"]),
        "memory limit": (resource.RLIMIT_AS, request["memory_bytes"]),
        "file size limit": (resource.RLIMIT_FSIZE, request["file_bytes"]),
        "open file limit": (resource.RLIMIT_NOFILE, request["open_files"]),
        "no core files": (resource.RLIMIT_CORE, 0),
    }
    if _counts_processes_alone(given):
        # The program itself counts, as do those of this user that wait for it.
        inside = "process namespace" in given
        counted = 1 + inside + (inside and "own user" not in given)
        limits["process limit"] = (resource.RLIMIT_NPROC, request["processes"] + counted)
    layers = []
    for name, (kind, value) in limits.items():
        # One more second of processor time between the signal and the end.
        if works(_set_limit, kind, value, value + (kind == resource.RLIMIT_CPU)):
            layers.append(name)
    return layers


def _set_limit(kind: int, soft: int, hard: int) -> None:
    """Set a limit, or a lower one that is in force already; raises OSError where this system has none of its kind."""
    highest = resource.getrlimit(kind)[1]
    if highest != resource.RLIM_INFINITY:
        soft, hard = min(soft, highest), min(hard, highest)
    try:
        resource.setrlimit(kind, (soft, hard))
    except ValueError as error:
        raise OSError(str(error)) from error


def _run(program: str, token: bytes) -> None:
    """Run the program in an empty module and report how it ended; whatever it left behind ends with the process."""
    # The program may replace anything in any module.
    write, leave, process, pid, show = os.write, os._exit, os.getpid, os.getpid(), sys.__excepthook__
    for name in [name for name in sys.modules if name.partition(".")[0] == "moeq"]:
        del sys.modules[name]
    try:
        # As in HumanEval's own harness, the module has no name of its own: __name__ == "__main__" is false in it.
        exec(compile(program, "<program>", "exec", dont_inherit=True), {})
        outcome = b" passed"
    except MemoryError:
        outcome = b" out of memory"
    except BaseException as error:
        outcome = b" failed: " + type(error).__name__.encode("ascii", "replace")
        outcome += _message(error)
        try:
            # Without the frame of this function.
            error = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
            show(type(error), error, error.__traceback__)
            sys.stderr.flush()
        except BaseException:  # of a program that replaced or closed it
            pass
    if process() == pid:
        write(_REPORT, token + outcome + b"\n")
    leave(0)


def _message(error: BaseException) -> bytes:
    """What an exception says, on one line; its class is the program's, so asking may fail in any way."""
    try:
        return b": " + str(error)[:400].encode("ascii", "backslashreplace").replace(b"\n", b" ").replace(b"\r", b" ")
    except BaseException:
        return b""
