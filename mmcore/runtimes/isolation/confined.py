"""Starts a worker process that has first given up what a model does not need; run by its path, not imported.

``confined.py CONFINEMENT WORKER'S ARGUMENTS…``: a JSON object (``user``, ``read``, ``home``, ``network``, ``cpus``) and
what ``worker.py`` wants. Only the standard library is imported before: nothing else runs with more than is left, and
there is one thread, for which alone the kernel's filters would hold. Each step that the kernel does not offer is passed
over and told in a line of the log.

- no new privileges (prctl(2)): a setuid program gives none.
- another user where the server is root, and no capability; to read files without being their owner is kept only where
  Landlock says which.
- Landlock (kernel 5.13; its documentation): files to be read are the interpreter's, the system's libraries and the
  model's; files to be written those of a folder that goes with the worker. No signal leaves for another process.
- seccomp (seccomp(2)): no sockets but Unix ones unless allowed, no ptrace, mounts, namespaces, keys, BPF, io_uring.
- limits: no core file, 1 GiB a file, 1,024 descriptors, and 512 processes and threads where the user is its own.
- where the model's settings name a number of cores, only so many, and sched_setaffinity(2) is refused from then on.
- a lower priority (nice(2)) than the serving process, which is to have its processor when a model takes all there are.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)

# prctl.h, capability.h
_PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 8, 22, 38, 2
_CAPABILITY_VERSION_3, _CAP_DAC_READ_SEARCH = 0x20080522, 2
_OOM_SCORE, _NICE = 500, 5

_FILE_BYTES, _DESCRIPTORS, _PROCESSES = 2**30, 1024, 512

# linux/landlock.h
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_SCOPES = 3  # abstract Unix sockets, signals
#: Bits of file rights that a version of Landlock knows.
_KNOWN = {1: 13, 2: 14, 3: 15, 4: 15}
_KNOWN_SINCE_5 = 16

_SYSTEM = (
    *(
        "/usr",
        "/lib",
        "/lib64",
        "/bin",
        "/opt",
        "/nix/store",
        "/etc/ld.so.cache",
        "/etc/ld.so.conf",
        "/etc/ld.so.conf.d",
    ),
    *("/etc/localtime", "/etc/timezone", "/etc/mime.types", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf"),
    *("/etc/hosts", "/etc/resolv.conf", "/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/etc/alternatives", "/etc/OpenCL"),
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys", "/proc/filesystems"),
    *("/sys/devices", "/sys/fs/cgroup", "/sys/bus", "/sys/class", "/dev/urandom", "/dev/random", "/dev/zero"),
)
_DEVICES = ("/dev/null", "/dev/dri", "/dev/kfd")

#: The system calls that are refused: their numbers on x86-64 and on 64-bit ARM (asm/unistd.h).
_REFUSED: dict[str, tuple[int, int | None]] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "setns": (308, 268),
    "unshare": (272, 97),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "syslog": (103, 116),
    "iopl": (172, None),
    "ioperm": (173, None),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
}  # fmt: skip
_SET_AFFINITY = (203, 122)
_MACHINES = ("x86_64", "aarch64")
_SOCKET, _CLONE, _CLONE3 = (41, 198), (56, 220), 435
_AUDIT_ARCH = (0xC000003E, 0xC00000B7)
_NEW_NAMESPACES = 0x7E020000
_ALLOW, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026


def confine(wanted: dict[str, Any]) -> list[str]:
    """Give everything up; what could not be, in words."""
    # When memory is short, the system is to take it from here and not from the serving process.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
    os.nice(_NICE)
    if wanted["cpus"] is not None:
        _keep_to(wanted["cpus"])
    _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for limit, most in ((resource.RLIMIT_FSIZE, _FILE_BYTES), (resource.RLIMIT_NOFILE, _DESCRIPTORS)):
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))
    missing = []
    rules = _ruleset(wanted)
    if rules is None:
        missing.append("Landlock: it may read what its user may")
    if os.geteuid() == 0:
        missing += _become(wanted["user"], wanted["read"], reads_all=rules is not None)
    if rules is not None:
        if _LIBC.syscall(_RESTRICT_SELF, rules, 0) != 0:
            missing.append(f"Landlock: {os.strerror(ctypes.get_errno())}")
        os.close(rules)
    if not _filter(network=wanted["network"], pinned=wanted["cpus"] is not None):
        missing.append("seccomp: it may use all system calls and the network")
    return missing


def _keep_to(count: int) -> None:
    """Run on so many processor cores at most, other ones than the worker started before."""
    cores = sorted(os.sched_getaffinity(0))
    first = os.getpid() % len(cores)
    os.sched_setaffinity(0, [*cores[first:], *cores[:first]][:count])


def _become(user: int, paths: list[str], *, reads_all: bool) -> list[str]:
    """Change to another user without capabilities, and say why not."""
    os.setgroups([])
    if not reads_all:
        os.seteuid(user)
        unreadable = [
            path for path in paths if Path(path).exists() and not os.access(path, os.R_OK, effective_ids=True)
        ]
        os.seteuid(0)
        if unreadable:
            _capabilities(0)
            return [f"another user: it could not read {unreadable[0]}"]
    _LIBC.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
    try:
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    except OSError as error:  # a namespace of users that has no such one
        _capabilities(0)
        return [f"another user: {error.strerror}"]
    resource.setrlimit(resource.RLIMIT_NPROC, (_PROCESSES, _PROCESSES))
    _capabilities(1 << _CAP_DAC_READ_SEARCH if reads_all else 0)
    return []


def _capabilities(kept: int) -> None:
    head = struct.pack("@Ii", _CAPABILITY_VERSION_3, 0)
    if _LIBC.capset(head, struct.pack("@6I", kept, kept, 0, 0, 0, 0)) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _ruleset(wanted: dict[str, Any]) -> int | None:
    """Landlock's rules as a descriptor; None where the kernel has no Landlock."""
    version = _LIBC.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)
    if version < 1:
        return None
    handled = (1 << _KNOWN.get(version, _KNOWN_SINCE_5)) - 1
    made = struct.pack("@QQQ", handled, 0, _SCOPES if version >= 6 else 0)
    rules = int(_LIBC.syscall(_CREATE_RULESET, made, len(made) if version >= 6 else 8, 0))
    if rules < 0:
        return None
    for path in (*_SYSTEM, *wanted["read"]):
        _allow(rules, path, _READ & handled)
    with suppress(OSError):
        for path in (*_DEVICES, *Path("/dev").glob("nvidia*")):
            _allow(rules, str(path), (_READ | _WRITE_FILE | _IOCTL_DEV) & handled)
    _allow(rules, wanted["home"], handled & ~_IOCTL_DEV)
    return rules


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not Path(path).is_dir():
        rights &= _ON_FILES
    rule = struct.pack("=Qi", rights, place)
    if _LIBC.syscall(_ADD_RULE, rules, _PATH_BENEATH, rule, 0) != 0:
        raise OSError(ctypes.get_errno(), f"Landlock takes no rule for {path}")
    os.close(place)


def _filter(*, network: bool, pinned: bool) -> bool:
    """Install the filter of system calls; whether there is one."""
    if platform.machine() not in _MACHINES:
        return False
    machine = _MACHINES.index(platform.machine())
    program: list[tuple[int, int, int, int]] = []

    def load(offset: int) -> None:
        program.append((0x20, 0, 0, offset))  # of struct seccomp_data

    def answer_if(code: int, value: int, answer: int) -> None:
        program.extend([(code, 0, 1, value), (0x06, 0, 0, answer)])

    equal, at_least, any_bit = 0x15, 0x35, 0x45
    load(4)
    program.extend([(equal, 1, 0, _AUDIT_ARCH[machine]), (0x06, 0, 0, _EPERM)])
    load(0)
    answer_if(at_least, 0x40000000, _EPERM)  # x32's numbers
    answer_if(equal, _CLONE3, _ENOSYS)  # its flags cannot be looked at; libraries go back to clone
    for numbers in _REFUSED.values():
        if (number := numbers[machine]) is not None:
            answer_if(equal, number, _EPERM)
    if pinned:
        answer_if(equal, _SET_AFFINITY[machine], _EPERM)
    program.append((equal, 0, 3, _CLONE[machine]))
    load(16)
    answer_if(any_bit, _NEW_NAMESPACES, _EPERM)
    if not network:
        load(0)
        program.append((equal, 0, 3, _SOCKET[machine]))
        load(16)
        program.extend([(equal, 1, 0, int(socket.AF_UNIX)), (0x06, 0, 0, _EPERM)])
    program.append((0x06, 0, 0, _ALLOW))
    code = b"".join(struct.pack("@HBBI", *one) for one in program)
    held = ctypes.create_string_buffer(code)
    described = struct.pack("@HP", len(program), ctypes.addressof(held))
    return bool(_LIBC.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, described, 0, 0) == 0)


def main() -> int:
    """Confine this process and let it be a worker."""
    for one in confine(json.loads(sys.argv[1])):
        print(f"not confined by {one}", flush=True)
    from mmcore.runtimes.isolation.worker import main as work

    return work(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
