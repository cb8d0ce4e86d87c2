"""A real Slurm of one node, which a test starts for itself and ends: no cgroups, no accounting, two stand-in GPUs.

It needs root, and Debian's slurmctld, slurmd, slurm-client and munge. Ports and files are its own, so it stands beside
any other Slurm of the machine.
"""

import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common import free_ports

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
PATIENCE = 240  # seconds, of a busy machine; a test that waits longer has failed


def missing() -> str:
    """Why no Slurm can be started here; empty if one can."""
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed (Debian: slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0:
        return "Slurm's daemons are started as root alone"
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        return f"the name of this machine, {socket.gethostname()}, is not in /etc/hosts"
    return ""


def _configuration(place: Path) -> str:
    host = socket.gethostname().partition(".")[0]
    controller, node = free_ports(2)
    return f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge/socket
CredType=cred/munge
SlurmctldPort={controller}
SlurmdPort={node}
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
KillWait=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=2000 Gres=gpu:2 State=UNKNOWN
PartitionName=gpu Nodes={host} Default=YES MaxTime=60 State=UP
"""


def asked(*command: str) -> str:
    """The stdout of a command of Slurm."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout.strip()


def until(true: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {what}\n{asked('squeue', '--array')}"
        time.sleep(0.2)


@contextmanager
def running(place: Path) -> Iterator[Path]:
    """A Slurm in a directory, for as long as the block runs; gives the file that SLURM_CONF must name."""
    host = socket.gethostname().partition(".")[0]
    (place / "munge").mkdir()
    for folder in ("state", "spool"):
        (place / folder).mkdir()
    for parent in (place, *place.parents):  # munged refuses a socket behind a directory that others cannot enter
        if parent.owner() == "root" and not parent.stat().st_mode & stat.S_IXOTH:
            parent.chmod(parent.stat().st_mode | stat.S_IXGRP | stat.S_IXOTH)
    key = place / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    (place / "munge").chmod(0o711)
    for i in range(2):
        os.mknod(place / f"nvidia{i}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # must be devices; this is /dev/null
    configuration = place / "slurm.conf"
    configuration.write_text(_configuration(place))
    (place / "gres.conf").write_text(f"NodeName={host} Name=gpu File={place}/nvidia[0-1]\n")
    files = {name: place / "munge" / name for name in ("socket", "pid", "log", "seed")}
    environment = {**os.environ, "SLURM_CONF": str(configuration)}
    try:
        for command in (
            ["munged", "--force", f"--socket={files['socket']}", f"--key-file={key}", f"--pid-file={files['pid']}",
             f"--log-file={files['log']}", f"--seed-file={files['seed']}"],
            ["slurmctld", "-c", "-f", str(configuration)],
            ["slurmd", "-c", "-f", str(configuration)],
        ):  # fmt: skip
            subprocess.run(command, check=True, env=environment, timeout=PATIENCE,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        state = ["sinfo", "--noheader", "--format=%t"]
        end = time.monotonic() + PATIENCE
        while subprocess.run(state, env=environment, capture_output=True, text=True, check=False).stdout != "idle\n":
            assert time.monotonic() < end, (place / "slurmctld.log").read_text()
            time.sleep(0.1)
        yield configuration
    finally:
        # Its jobs first, the node's daemon then, and munged last, whom the others ask.
        subprocess.run(["scancel", "--user=root"], env=environment, check=False, capture_output=True, timeout=PATIENCE)
        for file in (place / "slurmd.pid", place / "slurmctld.pid", files["pid"]):
            _end(file)


def _end(file: Path) -> None:
    """End the daemon that wrote its number into a file."""
    if not file.exists():
        return
    number = int(file.read_text())
    for how in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(number, how)
            for _ in range(100):
                os.kill(number, 0)
                time.sleep(0.1)
