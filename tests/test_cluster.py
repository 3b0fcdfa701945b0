"""The files for clusters, over stand-ins for Slurm's programs, torchrun and rdpm: what starts, what is queued again."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from test_docs import check

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


# ---- parts by any scheduler -----------------------------------------------------------------------------------------

TOKENIZE = ["tokenize", "images", "out/a b", "--tokenizer", "tok.pt"]
SAMPLE = ["sample", "--ckpt", "d16.pt", "--out", "s"]


def started(folder: Path, command: list[str], **variables: str) -> tuple[int, list[str]]:
    """The exit code of a command, and the arguments of the rdpm that it starts."""
    program = folder / "rdpm"
    program.write_text(f"#!/bin/bash\nprintf '%s\\n' \"$@\" > {folder}/arguments\n")
    program.chmod(0o755)
    (folder / "arguments").write_text("")
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **variables}
    code = subprocess.run(command, env=environment, check=False, capture_output=True, timeout=30).returncode
    return code, (folder / "arguments").read_text().splitlines()


@pytest.mark.parametrize(
    ("args", "variables", "part"),
    [
        (TOKENIZE, {"SLURM_ARRAY_TASK_ID": "3"}, ["--shards", "30-39"]),
        (TOKENIZE, {"SLURM_ARRAY_TASK_ID": "3", "PER_TASK": "1"}, ["--shards", "3-3"]),
        (TOKENIZE, {}, ["--finish"]),
        (
            SAMPLE,
            {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "8"},
            ["--shard", "3/8"],
        ),
    ],
)
def test_a_task_of_an_array_has_its_part(
    args: list[str], variables: dict[str, str], part: list[str], tmp_path: Path
) -> None:
    script = str(SCRIPT.with_name("array.sbatch"))
    assert started(tmp_path, ["bash", script, *args], **variables) == (0, [*args, *part])
    check([*args, *part])


@pytest.mark.parametrize("args", [[], SAMPLE, ["train-gen", "codes"]])
def test_an_array_is_of_tokenize_or_sample(args: list[str], tmp_path: Path) -> None:
    assert started(tmp_path, ["bash", str(SCRIPT.with_name("array.sbatch")), *args]) == (2, [])


def test_pods_and_managed_jobs_have_their_parts(tmp_path: Path) -> None:
    jobs = list(yaml.safe_load_all(SCRIPT.with_name("jobs.k8s.yaml").read_text()))
    pods = [job["spec"]["template"]["spec"]["containers"][0]["command"] for job in jobs]
    task = yaml.safe_load(SCRIPT.with_name("part.sky.yaml").read_text())
    shell = ["bash", "-c", task["run"].replace("/data", str(tmp_path))]
    for command, variables, part in [
        (pods[0], {"JOB_COMPLETION_INDEX": "3"}, ["--shards", "30-39"]),
        (pods[1], {}, ["--finish"]),
        (shell, {**task["envs"], "PART": "--shards 30-39"}, ["--shards", "30-39"]),
    ]:
        code, args = started(tmp_path, command, **variables)
        assert (code, args[:3], args[5:]) == (0, ["tokenize", "imagenet/train", "out/codes"], part)
        check(args)
