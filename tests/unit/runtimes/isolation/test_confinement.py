"""What a malicious model can do from inside its worker process: each attempt is refused, and honest work goes on."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from mmcore.errors import LoadFailed
from mmcore.model import ModelSettings, ModelSource
from mmcore.runtimes.isolation import IsolatedModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's means are Linux's"),
]

#: Runs the code it is given and answers with what that calls ``result``, or with its exception.
OBEDIENT = """
class Model:
    inputs = [("CODE", "BYTES", [1])]
    outputs = [("RESULT", "BYTES", [1])]

    def predict(self, inputs):
        scope = {}
        try:
            exec(inputs["CODE"][0], scope)
        except Exception as error:
            return {"RESULT": [f"{type(error).__name__}: {error}"]}
        return {"RESULT": [str(scope.get("result"))]}
"""
SYSCALL = "import ctypes; libc = ctypes.CDLL(None, use_errno=True); "

Run = Callable[[str], str]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "other" / "credentials"
    file.parent.mkdir()
    file.write_text("a secret")
    return file


def start(folder: Path, *, network: bool = False, **settings: Any) -> IsolatedModel:
    folder.mkdir()
    (folder / "model.py").write_text(OBEDIENT)
    source = ModelSource("m", "1", "python", folder / "model.py", ModelSettings(**settings), folder=folder)
    return IsolatedModel(source, network=network)


def run_in(model: IsolatedModel, code: str) -> str:
    ((_, _, result),) = model.infer({"CODE": np.array([code.encode()], object)}, ())
    return bytes(result[0]).decode()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IsolatedModel]:
    os.environ["MMCORE_TEST_CREDENTIAL"] = "a secret"
    made = start(tmp_path_factory.mktemp("models") / "m")
    yield made
    made.close()
    del os.environ["MMCORE_TEST_CREDENTIAL"]


@pytest.fixture
def run(model: IsolatedModel) -> Run:
    return lambda code: run_in(model, code)


def test_files_of_others_cannot_be_read(run: Run, secret: Path) -> None:
    assert run(f"result = open({str(secret)!r}).read()").startswith("PermissionError")
    assert run(f"import os; result = os.listdir({str(secret.parent)!r})").startswith("PermissionError")
    assert run("result = open('/etc/shadow').read()").startswith("PermissionError")


def test_no_file_is_written_but_in_its_own_place(run: Run, secret: Path, model: IsolatedModel) -> None:
    assert run(f"open({str(secret)!r}, 'w')").startswith("PermissionError")
    assert run("open('/tmp/mmcore-test-planted', 'w')").startswith("PermissionError")
    assert run("open('/dev/shm/mmcore-test-planted', 'w')").startswith("PermissionError")
    own = str(model._source.path)
    assert run(f"result = open({own!r}).read()") == OBEDIENT
    assert run(f"open({own!r}, 'a')").startswith("PermissionError")
    assert run("import tempfile; f = tempfile.TemporaryFile(); f.write(b'scratch'); f.seek(0); result = f.read()") == (
        "b'scratch'"
    )


def test_what_it_wrote_goes_with_it(tmp_path: Path) -> None:
    made = start(tmp_path / "m")
    home = Path(run_in(made, "import tempfile, os; result = os.path.dirname(tempfile.mkstemp()[1])"))
    assert len(list(home.iterdir())) == 1
    made.close()
    assert not home.exists()


def test_no_credential_is_to_be_had(run: Run) -> None:
    assert "MMCORE_TEST_CREDENTIAL" not in run("import os; result = dict(os.environ)")
    assert run("import os; result = open(f'/proc/{os.getppid()}/environ').read()").startswith("PermissionError")
    assert run("import os; result = open(f'/proc/{os.getppid()}/mem', 'rb')").startswith("PermissionError")
    assert run("import os; result = os.listdir(f'/proc/{os.getppid()}/fd')").startswith("PermissionError")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_it_is_another_user_without_capabilities(run: Run) -> None:
    users = run("import os; result = (*os.getresuid(), *os.getresgid(), *os.getgroups())")
    assert len(set(users.strip("()").split(", "))) == 1
    assert not users.startswith("(0")
    for attempt in ("os.setuid(0)", "os.chown(os.environ['HOME'], 0, 0)"):
        assert run(f"import os; {attempt}").startswith("PermissionError")
    status = run("result = open('/proc/self/status').read()")
    kept = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff"))
    assert int(kept, 16) in (0, 1 << 2)  # CAP_DAC_READ_SEARCH, within what Landlock lets it read


def test_it_gets_no_privilege_again(run: Run) -> None:
    status = dict(line.split(":\t", 1) for line in run("result = open('/proc/self/status').read()").splitlines())
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    for limit in ("RLIMIT_CORE", "RLIMIT_FSIZE", "RLIMIT_NOFILE"):
        raised = f"import resource as r; h = r.getrlimit(r.{limit})[1]; r.setrlimit(r.{limit}, (h + 1, h + 1))"
        assert run(raised).startswith(("ValueError", "PermissionError")), limit
    assert run("import os; os.nice(-1)").startswith("PermissionError")


def test_other_processes_are_out_of_reach(run: Run) -> None:
    assert run("import os; os.kill(os.getppid(), 0)").startswith("PermissionError")
    assert run(SYSCALL + "import os; r = libc.ptrace(16, os.getppid(), 0, 0); result = (r, ctypes.get_errno())") == (
        "(-1, 1)"
    )


@pytest.mark.parametrize("call", [
    "libc.unshare(0x10000000)", "libc.mount(b'x', b'/tmp', b'tmpfs', 0, 0)", "libc.chroot(b'/tmp')",
    "libc.syscall(425, 1, 0)", "libc.syscall(438, 3, 0, 0)",
], ids=["unshare", "mount", "chroot", "io_uring_setup", "pidfd_getfd"])  # fmt: skip
def test_the_kernels_odd_corners_are_closed(run: Run, call: str) -> None:
    assert run(f"{SYSCALL}r = {call}; result = (r, ctypes.get_errno())") == "(-1, 1)"


def test_there_is_no_network_unless_allowed(run: Run, tmp_path: Path) -> None:
    for family in ("AF_INET", "AF_INET6", "AF_NETLINK"):
        assert run(f"import socket; socket.socket(socket.{family}, socket.SOCK_DGRAM)").startswith("PermissionError")
    assert run("import socket; a, b = socket.socketpair(); a.send(b'x'); result = b.recv(1)") == "b'x'"
    allowed = start(tmp_path / "m", network=True)
    assert run_in(allowed, "import socket; result = socket.create_server(('127.0.0.1', 0)).fileno() > 0") == "True"
    allowed.close()


def test_it_gets_no_more_processor_cores_than_its_settings_say(tmp_path: Path) -> None:
    made = start(tmp_path / "m", isolation_cpus=1)
    assert run_in(made, "import os; result = len(os.sched_getaffinity(0))") == "1"
    widened = "import os; os.sched_setaffinity(0, range(os.cpu_count())); result = 'more'"
    assert run_in(made, widened).startswith("PermissionError")
    # Nor do its processes: what they take together is the time that has passed, at most.
    busy = """
import os, time
began, spun = time.monotonic(), []
for _ in range(3):
    if not os.fork():
        while time.process_time() < 0.1:
            pass
        os._exit(0)
for _ in range(3):
    os.wait()
took = os.times()
result = (took.children_user + took.children_system) / (time.monotonic() - began)
"""
    assert float(run_in(made, busy)) < 1.2
    made.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="the number of processes is counted by user")
def test_a_fork_bomb_is_bounded_and_ends_with_the_worker(tmp_path: Path) -> None:
    made = start(tmp_path / "m")
    bomb = """
import os, time
result = 0
while result < 2000:
    try:
        child = os.fork()
    except BlockingIOError:
        break
    if not child:
        os.setsid()
        time.sleep(600)
        os._exit(0)
    result += 1
"""
    assert 100 < int(run_in(made, bomb)) <= 512
    user = int(run_in(made, "import os; result = os.getuid()"))
    made.close()
    left = [one for one in psutil.process_iter(["uids", "status"]) if one.info["uids"].real == user]
    assert not [one for one in left if one.info["status"] != psutil.STATUS_ZOMBIE]


class Evil:
    """Unpickled, it opens a file that is not the model's."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self.path, "w")


def test_a_pickle_does_not_get_further_when_it_is_loaded(tmp_path: Path, secret: Path) -> None:
    file = tmp_path / "model.pkl"
    file.write_bytes(pickle.dumps(Evil(secret)))
    with pytest.raises(LoadFailed, match="Permission denied"):
        IsolatedModel(ModelSource("m", "1", "sklearn", file))
    assert secret.read_text() == "a secret"


def test_workers_do_not_see_each_others_places(run: Run, tmp_path: Path) -> None:
    other = start(tmp_path / "m")
    home, pid = run_in(other, "import os; result = os.environ['HOME'], os.getpid()").strip("()").split(", ")
    assert run(f"import os; os.listdir({home})").startswith("PermissionError")
    assert run(f"import os; os.kill({pid}, 0)").startswith("PermissionError")
    other.close()


def test_honest_models_start_at_the_same_time(tmp_path: Path) -> None:
    made: list[IsolatedModel] = []
    threads = [threading.Thread(target=lambda n=n: made.append(start(tmp_path / f"m{n}"))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    users = {run_in(one, "import os; result = os.getuid()") for one in made}
    for one in made:
        one.close()
    assert len(made) == 4
    assert len(users) == (4 if os.geteuid() == 0 else 1)
