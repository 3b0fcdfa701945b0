"""The Slurm script, over stand-ins for Slurm's programs and torchrun: what is started, what is queued again."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from rdpm_cli.schema import recipe_folder

SCRIPT = recipe_folder() / "cluster" / "train.sbatch"
STAND_INS = {
    "srun": """
shift  # its one option
exec "$@"
""",
    "scontrol": """
echo "$@" >> {log}/scontrol
if [ "$1" = show ]; then printf 'node1\\nnode2\\n'; fi
""",
    "torchrun": """
printf '%s\\n' "$@" > {log}/arguments
echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > {log}/timeout
trap 'echo signalled > {log}/signalled; exit {after}' USR1
touch {log}/started
for _ in $(seq {waits}); do sleep 0.05; done
exit {code}
""",
}
JOB = {
    "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4",
}  # fmt: skip


def start(folder: Path, code: int = 0, waits: int = 0, after: int = 1, **variables: str) -> "subprocess.Popen[str]":
    """The script with the stand-ins first on the path; torchrun's waits 0.05 s so often, then exits with the code.

    after: its exit code after a signal."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in STAND_INS.items():
        (programs / name).write_text("#!/bin/bash" + text.format(log=folder, code=code, waits=waits, after=after))
        (programs / name).chmod(0o755)
    environment = {**os.environ, **JOB, "PATH": f"{programs}:{os.environ['PATH']}", **variables}
    command = ["bash", str(SCRIPT), "train-gen", "out/codes", "--out", "runs/a b"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def requeued(folder: Path) -> bool:
    return "requeue 12345" in (folder / "scontrol").read_text().splitlines()


@pytest.mark.parametrize(("code", "again"), [(0, False), (75, True), (1, False), (3, False)])
def test_what_was_saved_is_queued_again_and_nothing_else(code: int, again: bool, tmp_path: Path) -> None:
    process = start(tmp_path, code)
    process.communicate(timeout=30)
    assert (process.returncode, requeued(tmp_path)) == (code, again)


@pytest.mark.parametrize(("after", "code"), [(1, 75), (75, 75), (0, 0)])  # torchrun's own is 1 after a signal
def test_a_signal_reaches_torchrun_and_what_had_not_finished_goes_on_later(
    after: int, code: int, tmp_path: Path
) -> None:
    process = start(tmp_path, waits=200, after=after)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert (tmp_path / "signalled").exists()
    assert (process.returncode, requeued(tmp_path)) == (code, code == 75)


def test_every_node_starts_the_same_command_with_one_meeting_place(tmp_path: Path) -> None:
    start(tmp_path, SLURM_RESTART_COUNT="3").communicate(timeout=30)
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert dict(zip(arguments[0:12:2], arguments[1:12:2], strict=True)) == {
        "--nnodes": "2",
        "--nproc-per-node": "4",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "node1:22345",
        "--rdzv-id": "12345.3",
        "--signals-to-handle": "SIGTERM,SIGINT,SIGUSR1",
    }
    assert arguments[12:] == ["-m", "rdpm_cli", "train-gen", "out/codes", "--out", "runs/a b"]
    assert int((tmp_path / "timeout").read_text()) < 300


def test_the_script_needs_a_command_and_asks_slurm_for_a_signal_and_a_requeue() -> None:
    assert subprocess.run(["bash", str(SCRIPT)], env={**os.environ, **JOB}, check=False).returncode == 2
    options = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append"} <= set(options)
