"""Attempts to get out of the sandbox, each against several sets of layers, and without any as the control.

A set that does not prevent something on this system is skipped, with those words.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import moeq
from moeq.programs.sandbox import LAYERS, Limits, protections, run_program

pytestmark = pytest.mark.slow
RIGHTS = ("no capabilities", "no new privileges")
SETS = {
    "all": LAYERS,
    "without seccomp and landlock": tuple(layer for layer in LAYERS if layer not in ("seccomp", "landlock")),
    "seccomp and landlock alone": (*RIGHTS, "seccomp", "landlock"),
}
LIMITS = Limits(seconds=20.0, cpu_seconds=5)
TRY = "def attempt(f, *a, **k):\n    try: return f(*a, **k)\n    except OSError: return None\n"


@pytest.fixture(params=list(SETS))
def layers(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return SETS[request.param]


def need(purpose: str, layers: tuple[str, ...]) -> None:
    if purpose in protections(layers=layers).missing:
        pytest.skip(f"on this system these layers do not prevent programs to {purpose}")


def num_confined() -> int:
    """Processes of this checkout's sandbox that are alive."""
    mark = f"{str(Path(moeq.__file__).parents[1])!r}); from moeq.programs.confinement".encode()
    found = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found += mark in (folder / "cmdline").read_bytes()
        except OSError:
            continue
    return found


def assert_nothing_is_left() -> None:
    until = time.monotonic() + 10.0
    while num_confined() and time.monotonic() < until:
        time.sleep(0.02)
    assert num_confined() == 0


@pytest.fixture
def open_folder(tmp_path: Path) -> Path:
    """A folder that anybody may write to, so that ids of users alone protect nothing in it."""
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


FORK_BOMBS = {
    "plain": "import os\nwhile True: attempt(os.fork)",
    "sessions": "import os\nwhile True:\n    attempt(os.fork); attempt(os.setsid)",
    "double": "import os, time\nfor _ in range(50):\n    if attempt(os.fork) == 0:\n        os.setsid()\n"
    "        if attempt(os.fork) == 0:\n            time.sleep(600)\n        os._exit(0)\ntime.sleep(1)",
    "subprocess": "import subprocess\nwhile True: attempt(subprocess.Popen, ['/bin/sh', '-c', 'sleep 600'])",
    "threads": "import threading as t, time\nwhile True:\n    try: t.Thread(target=time.sleep, args=(600,)).start()\n"
    "    except RuntimeError: pass",
}


@pytest.mark.parametrize("bomb", list(FORK_BOMBS))
def test_a_fork_bomb_is_bounded_and_leaves_nothing_behind(bomb: str, layers: tuple[str, ...]) -> None:
    need("start any number of processes", layers)
    need("leave processes behind", layers)
    run_program(TRY + FORK_BOMBS[bomb], Limits(seconds=0.5), layers)
    assert_nothing_is_left()


def test_processes_are_counted_where_they_are_not_forbidden() -> None:
    layers = SETS["without seccomp and landlock"]
    if "process limit" not in protections(layers=layers).layers:
        pytest.skip("on this system the limit of processes does not bind this user")
    program = (
        "import os, time\nn = 0\nwhile True:\n    if os.fork() == 0: time.sleep(600)\n    n += 1\n    assert n < 9"
    )
    assert run_program(program, Limits(processes=8), layers).reason.startswith("failed: BlockingIOError")
    assert run_program(program, Limits(processes=9), layers).reason.startswith("failed: AssertionError")
    assert_nothing_is_left()


def test_a_child_that_outlives_the_program_is_ended(layers: tuple[str, ...]) -> None:
    need("leave processes behind", layers)
    program = "import os, time\nif attempt(os.fork) == 0:\n    os.setsid(); os.closerange(0, 100); time.sleep(600)"
    assert run_program(TRY + program, LIMITS, layers).passed
    assert_nothing_is_left()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with the one that started it")
def test_nothing_outlives_an_evaluation_that_is_killed(layers: tuple[str, ...], open_folder: Path) -> None:
    program = "import time; time.sleep(600)"
    run = f"from moeq.programs.sandbox import *; run_program({program!r}, Limits(seconds=600), {layers})"
    environment = {**os.environ, "TMPDIR": str(open_folder)}
    parent = subprocess.Popen([sys.executable, "-c", run], cwd=Path(moeq.__file__).parents[1], env=environment)
    until = time.monotonic() + 30.0
    while num_confined() < 1 and time.monotonic() < until:
        time.sleep(0.02)
    assert num_confined() >= 1
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    assert_nothing_is_left()


def test_a_child_cannot_pass_for_its_parent(layers: tuple[str, ...]) -> None:
    program = "import os\nchild = os.fork()\nif child:\n    os.waitpid(child, 0); os._exit(0)"
    assert not run_program(program, LIMITS, layers).passed


def test_a_huge_file_stops_at_the_limit(layers: tuple[str, ...]) -> None:
    program = "f = open('huge', 'wb')\nfor _ in range(1000): f.write(bytes(1 << 20)); f.flush()"
    verdict = run_program(program, Limits(file_bytes=1 << 20), layers)
    assert verdict.reason.startswith("failed: OSError: [Errno 27]")
    assert not run_program("import os; os.truncate(open('huge', 'wb').name, 1 << 40)", LIMITS, layers).passed


def test_many_files_do_not_fill_the_disk(layers: tuple[str, ...]) -> None:
    need("fill the disk", layers)
    program = "for i in range(64):\n    open(f'{i}', 'wb').write(bytes(1 << 20))"
    limits = Limits(disk_bytes=8 << 20)
    assert run_program(program, limits, layers).reason.startswith("failed: OSError: [Errno 28]")
    assert run_program("for i in range(20000): open(f'{i}', 'wb').close()", limits, layers).reason.startswith(
        "failed: OSError"
    )


def test_its_own_directory_is_empty_writable_and_gone_afterwards(layers: tuple[str, ...]) -> None:
    program = (
        "import os, tempfile\nassert os.listdir() == []\nopen('a', 'w').write('b')\nassert open('a').read() == 'b'\n"
        "os.mkdir('c'); os.rename('a', 'c/d'); os.chmod('c', 0)\ntempfile.TemporaryFile().write(b'x')\n"
        "assert False, os.getcwd()"
    )
    verdict = run_program(program, LIMITS, layers)
    folder = verdict.reason.removeprefix("failed: AssertionError: ")
    assert folder.startswith("/"), verdict
    assert folder == "/tmp" or not Path(folder).exists()


def writing_program(path: Path) -> str:
    return (
        f"import os, shutil\npath = {str(path)!r}\n"
        "def write(p):\n    with open(p, 'w') as f: f.write('escaped')\n"
        "attempt(write, path + '/new')\nattempt(write, path + '/old')\n"
        "attempt(write, os.path.relpath(path) + '/relative')\nattempt(write, '../' * 20 + path[1:] + '/up')\n"
        "attempt(os.symlink, path, 'link'); attempt(write, 'link/linked')\n"
        "attempt(os.remove, path + '/old'); attempt(os.truncate, path + '/old', 0)\n"
        "attempt(os.mkdir, path + '/folder'); attempt(os.rename, path + '/old', path + '/moved')\n"
        "attempt(os.link, path + '/old', path + '/hard'); attempt(os.chmod, path, 0o700)\n"
        "attempt(shutil.rmtree, path)\n"
    )


def test_nothing_outside_of_its_directory_changes(layers: tuple[str, ...], open_folder: Path) -> None:
    need("write files outside of its directory", layers)
    (open_folder / "old").write_text("as it was")
    (open_folder / "old").chmod(0o666)
    assert run_program(TRY + writing_program(open_folder), LIMITS, layers).passed
    assert os.listdir(open_folder) == ["old"]
    assert (open_folder / "old").read_text() == "as it was"


def test_home_temporary_and_repository_folders_cannot_be_written_to(layers: tuple[str, ...]) -> None:
    need("write files outside of its directory", layers)
    name = f"escaped-{os.getpid()}"
    folders = [
        Path.home(),
        Path("/tmp"),
        Path("/var/tmp"),
        Path("/dev/shm"),
        Path(moeq.__file__).parent,
        Path(sys.prefix),
    ]
    lines = [f"attempt(open, {str(folder / name)!r}, 'w')" for folder in folders]
    lines += [f"import os; attempt(open, os.path.expanduser('~{user}/{name}'), 'w')" for user in ("", "root")]
    assert run_program(TRY + "\n".join(lines), LIMITS, layers).passed
    assert [folder for folder in folders if (folder / name).exists()] == []


def test_without_layers_the_same_program_writes_there(open_folder: Path) -> None:
    (open_folder / "old").write_text("as it was")
    assert run_program(TRY + writing_program(open_folder), LIMITS, ()).passed
    assert not (open_folder / "old").exists()


def test_files_of_others_cannot_be_read(layers: tuple[str, ...], open_folder: Path) -> None:
    need("read other files", layers)
    secret = open_folder / "secret"
    secret.write_text("a secret")
    secret.chmod(0o644)
    paths = [str(secret), "/etc/passwd", moeq.__file__, str(open_folder), "/home"]
    program = "import os\nfor path in PATHS:\n    f = os.listdir if os.path.isdir(path) else open\n"
    program = program.replace("PATHS", repr(paths)) + "    assert attempt(f, path) is None, path"
    assert run_program(TRY + program, LIMITS, layers).passed
    assert run_program(TRY + program, LIMITS, ()).reason.startswith("failed: AssertionError")


@pytest.fixture
def victim() -> Iterator["subprocess.Popen[bytes]"]:
    """Another process of this user, with a secret in its environment."""
    command = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    process = subprocess.Popen(command, env={"SECRET": "open sesame"})
    yield process
    process.kill()
    process.wait()


def test_the_environment_is_empty(layers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "open sesame")
    program = "import os\nextra = set(os.environ) - {'PATH', 'HOME', 'TMPDIR', 'LANG', 'LC_CTYPE', 'PYTHONHASHSEED'}"
    verdict = run_program(program + "\nassert not extra, extra", LIMITS, layers)
    assert verdict.passed, verdict


READ_ENVIRONMENTS = (
    "import glob\nfound = []\n"
    "for path in [f'/proc/{VICTIM}/environ', *glob.glob('/proc/[0-9]*/environ')]:\n"
    "    f = attempt(open, path, 'rb')\n    data = f and attempt(f.read) or b''\n"
    "    found += [path] * (b'open sesame' in data)\n"
    "assert not found, found"
)


def test_environments_of_other_processes_cannot_be_read(
    layers: tuple[str, ...], victim: "subprocess.Popen[bytes]"
) -> None:
    need("read other processes' environment", layers)
    program = TRY + READ_ENVIRONMENTS.replace("VICTIM", str(victim.pid))
    assert run_program(program, LIMITS, layers).passed
    assert run_program(program, LIMITS, ()).reason.startswith("failed: AssertionError")


def test_other_processes_get_no_signals(layers: tuple[str, ...], victim: "subprocess.Popen[bytes]") -> None:
    need("signal other processes", layers)
    program = TRY + (
        f"import os, signal\nfor pid in (os.getppid(), {victim.pid}, {os.getpid()}):\n"
        "    for number in (signal.SIGTERM, signal.SIGKILL):\n"
        "        if pid > 0: attempt(os.kill, pid, number); attempt(os.killpg, pid, number)\n"
    )
    assert run_program(program, LIMITS, layers).passed
    assert victim.poll() is None


def test_without_layers_the_victim_dies(victim: "subprocess.Popen[bytes]") -> None:
    run_program(f"import os; os.kill({victim.pid}, 9)", LIMITS, ())
    assert victim.wait(10) == -9


def reached(listener: socket.socket) -> bool:
    """Whether anything came to a socket that does not block."""
    try:
        if listener.type == socket.SOCK_DGRAM:
            return listener.recv(1) == b"x"
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


@pytest.fixture(params=["tcp", "tcp6", "udp", "unix", "abstract"])
def listener(request: pytest.FixtureRequest, open_folder: Path) -> Iterator[socket.socket]:
    family = {"tcp6": socket.AF_INET6, "unix": socket.AF_UNIX, "abstract": socket.AF_UNIX}.get(
        request.param, socket.AF_INET
    )
    kind = socket.SOCK_DGRAM if request.param == "udp" else socket.SOCK_STREAM
    address = {
        "unix": str(open_folder / "socket"),
        "abstract": f"\0moeq-{os.getpid()}",
        "tcp6": ("::1", 0),
    }.get(request.param, ("127.0.0.1", 0))
    try:
        listener = socket.socket(family, kind)
        listener.bind(address)
    except OSError as error:
        pytest.skip(f"this system has no {request.param} socket to listen on: {error}")
    if request.param == "unix":
        os.chmod(address, 0o777)
    if request.param != "udp":
        listener.listen()
    listener.setblocking(False)
    with listener:
        yield listener


def test_no_listener_on_this_machine_is_reached(layers: tuple[str, ...], listener: socket.socket) -> None:
    program = (
        f"import socket\ndef call():\n    s = socket.socket({int(listener.family)}, {int(listener.type)})\n"
        f"    s.settimeout(2)\n    s.connect({listener.getsockname()!r})\n    s.send(b'x')\nattempt(call)"
    )
    need("use the network", layers)
    assert run_program(TRY + program, LIMITS, layers).passed
    assert not reached(listener)
    # The control: the attempt is a real one.
    assert run_program(TRY + program, LIMITS, ()).passed
    assert reached(listener)


def test_the_launcher_s_processes_cannot_be_traced(layers: tuple[str, ...]) -> None:
    need("signal other processes", layers)
    program = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.ptrace(16, os.getppid() or 1, 0, 0) == -1\n"
        "assert attempt(open, f'/proc/{os.getppid()}/mem', 'rb') is None"
    )
    verdict = run_program(TRY + program, LIMITS, layers)
    assert verdict.passed, verdict


def test_rights_cannot_be_taken_back(layers: tuple[str, ...]) -> None:
    need("write files outside of its directory", layers)
    program = (
        "import ctypes, os, resource\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == -1\nassert libc.chroot(b'/') == -1\n"
        "effective = (ctypes.c_uint32 * 6)()\n"
        "assert libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), effective) == 0 and not any(effective)\n"
        "for change in (os.setuid, os.setgid, os.seteuid):\n"
        "    assert os.getuid() == 0 or attempt(change, 0) is None\n"
        "for limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):\n"
        "    try: resource.setrlimit(limit, (-1, -1)); assert False\n    except ValueError: pass"
    )
    verdict = run_program(TRY + program, LIMITS, layers)
    assert verdict.passed, verdict


def test_every_layer_that_the_system_offers_takes_effect() -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux has these layers")
    given = protections()
    if "Seccomp:" in Path("/proc/self/status").read_text() and os.uname().machine in ("x86_64", "aarch64"):
        assert "seccomp" in given.layers
    try:
        offered = subprocess.run(
            ["unshare", "--map-root-user", "--net", "--pid", "--mount", "--fork", "true"]
        ).returncode
    except FileNotFoundError:
        offered = 1
    if offered != 0:
        pytest.skip("this system lets this user make no namespaces")
    assert {"network namespace", "process namespace", "private file system"} < set(given.layers)
    assert given.missing == ()
