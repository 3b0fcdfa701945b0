"""`--engine ray`: two local workers write what one process writes, and a task whose worker is killed runs again."""

import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from generators import save_generator
from stores import content

from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.distributed import one_thread
from rdpm_cli.engine import ray_tasks
from rdpm_cli.errors import RunError
from rdpm_cli.runs import Result

ray = pytest.importorskip("ray")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
pytestmark = pytest.mark.slow  # a minute, in which processes import torch
BOTH = ["--shards", "0", "--finish"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", autouse=True)
def workers() -> Iterator[None]:
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()


@pytest.fixture
def tokenize(
    image_folder: Path, tiny_tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    monkeypatch.chdir(tmp_path)  # relative paths are those of the command, not of a worker
    Path("images").symlink_to(image_folder)
    Path("tokenizer.pt").symlink_to(tiny_tokenizer_file)
    return ["tokenize", "images", "codes", "--shard-size", "10", "--device", "cpu", "--quiet"]


def test_a_store_has_the_bytes_of_one_process(tokenize: list[str], capsys: Capture) -> None:
    assert run_cli([*tokenize, "--engine", "ray", "--shards", "1-2"]) == 0
    assert {path.name for path in Path("codes").glob("note-*")} == {"note-00001.json", "note-00002.json"}
    assert run_cli([*tokenize, "--engine", "ray"]) == 0
    assert run_cli(["tokenize", "images", "whole", *tokenize[3:]]) == 0
    assert content(Path("codes")) == content(Path("whole"))
    for wrong, word in ((["--seed", "1"], "seed: 0 -> 1"), (["--shards", "4"], "last shard, 3"), (BOTH, "--finish")):
        capsys.readouterr()
        assert run_cli([*tokenize, "--engine", "ray", *wrong]) == 2
        assert word in capsys.readouterr().err


def test_samples_have_the_bytes_of_one_process(tiny_tokenizer_file: Path, tmp_path: Path) -> None:
    generator = save_generator(tmp_path / "generator.pt", tiny_tokenizer_file, cfg=1.0)
    command = ["sample", "--ckpt", str(generator), "--per-class", "7", "--device", "cpu", "--npz", "--quiet", "--out"]
    assert run_cli([*command, str(tmp_path / "ray"), "--engine", "ray"]) == 0
    with one_thread():
        assert run_cli([*command, str(tmp_path / "local")]) == 0
    names = {path.name for path in (tmp_path / "local").iterdir() if path.name[0] != "."} - {"run.json", "previews"}
    assert {"samples.json", "samples.npz", "000020.png"} <= names
    for name in names:
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def killed(times: int, folder: Path) -> Result:
    """A task whose worker is killed so many times."""
    starts = len(list(folder.iterdir()))
    (folder / str(starts)).touch()
    if starts < times:
        os.kill(os.getpid(), signal.SIGKILL)
    return Result(f"start {starts + 1}")


def test_a_task_whose_worker_is_killed_runs_again_but_not_forever(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    results = ray_tasks.run([partial(killed, 1, tmp_path / "a")], "test", "tasks", "cpu")
    assert [result.title for result in results] == ["start 2"]
    with pytest.raises(RunError):
        ray_tasks.run([partial(killed, 99, tmp_path / "b")], "test", "tasks", "cpu")
    assert len(list((tmp_path / "b").iterdir())) == 1 + ray_tasks.RETRIES
