"""Micro-batches: what a plan fixes, workers in order with errors in their turn, the path of a GPU taken on the CPU."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import alive, spawn, wait_for, wait_until_gone
from stores import Making, MemoryImages
from torch import Tensor

from rdpm_cli.codes import write
from rdpm_cli.codes.write import StoreOptions, in_order, make_plan, report_killed_worker
from rdpm_cli.errors import DataError, ImageError, RdpmError, RunError, UsageError
from rdpm_cli.tokenizer import model

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def numbers(count: int) -> list[range]:
    """Micro-batches of one item."""
    return [range(i, i + 1) for i in range(count)]


# ---- workers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "batches", "processes"), [(3, 60, 3), (64, 2, 2), (1, 4, 0), (2, 0, 0)])
def test_results_come_in_order_from_this_number_of_processes_of_one_thread(
    workers: int, batches: int, processes: int
) -> None:
    def work(batch: range) -> tuple[int, int, int]:
        time.sleep(0.02 if batch.start % 3 == 0 else 0.005)  # results come out of order
        return batch.start, os.getpid(), torch.get_num_threads()

    results = list(in_order(work, numbers(batches), workers))
    assert [number for number, *_ in results] == list(range(batches))
    pids = {pid for _, pid, _ in results} - {os.getpid()}
    assert len(pids) == processes
    assert not any(alive(pid) for pid in pids)
    assert {threads for _, _, threads in results} <= {1}


def test_workers_end_with_the_iterator_in_the_middle_of_their_work() -> None:
    results = in_order(lambda batch: time.sleep(batch.start), [range(0, 1), *numbers(100)[50:]], 2)
    next(results)
    pids = [child.pid for child in multiprocessing.active_children()]
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 2
    assert not any(alive(pid) for pid in pids if pid)


ERRORS: list[RdpmError] = [ImageError("image 5", "copy it", name="5.png", reason="torn"), RunError("disk 5")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_comes_in_its_turn_as_itself(error: RdpmError, workers: int) -> None:
    def work(batch: range) -> int:
        if batch.start == 5:
            raise error
        return batch.start

    results: list[int] = []
    with pytest.raises(type(error)) as caught:
        results.extend(in_order(work, numbers(20), workers))
    assert results == list(range(5))
    assert (caught.value.message, caught.value.hint) == (error.message, error.hint)
    assert (caught.value.exit_code, vars(caught.value)) == (error.exit_code, vars(error))


def test_a_bug_in_a_worker_keeps_its_type_and_traceback() -> None:
    def work(batch: range) -> int:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="in work"):
        list(in_order(work, numbers(3), 2))


def test_a_killed_worker_is_an_error_with_exit_code_1() -> None:
    def work(batch: range) -> int:
        if batch.start == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch.start

    with pytest.raises(RunError) as caught, report_killed_worker():
        list(in_order(work, numbers(100), 2))
    assert (caught.value.exit_code, "--workers" in caught.value.hint) == (1, True)


def lead(folder: str) -> None:
    """Be a process with two workers that take long."""

    def note_and_wait(batch: range) -> None:
        (Path(folder) / str(batch.start)).write_text(str(os.getpid()))
        time.sleep(60)

    list(in_order(note_and_wait, numbers(2), 2))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(number: signal.Signals, tmp_path: Path) -> None:
    parent = spawn(lead, str(tmp_path))
    notes = [tmp_path / "0", tmp_path / "1"]
    wait_for(lambda: all(note.exists() and note.read_text() for note in notes), parent)
    pids = [int(note.read_text()) for note in notes]
    assert all(alive(pid) for pid in pids)
    assert parent.pid is not None
    os.kill(parent.pid, number)
    parent.join(20)
    wait_until_gone(pids, 20)


# ---- the plan ------------------------------------------------------------------------------------------------------

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "options", "recorded"),
    [
        (CPU, {"precision": "fp32"}, ("cpu", "fp32", 128)),
        (CUDA, {}, ("cuda", "bf16", 1024)),
        (CUDA, {"precision": "fp32", "micro_batch": 6}, ("cuda", "fp32", 6)),
        (CPU, {"micro_batch": 4}, "--micro-batch"),
        (CPU, {"precision": "bf16"}, "--precision"),
        (CPU, {"flip": True, "views": 3}, "--views"),
    ],
)
def test_a_plan_records_device_precision_and_micro_batch_or_refuses_them(
    device: torch.device, options: dict[str, Any], recorded: object, tiny_tokenizer_file: Path
) -> None:
    tokenizer, file = model.load(tiny_tokenizer_file)
    if isinstance(recorded, str):
        with pytest.raises(UsageError, match=recorded):
            make_plan(MemoryImages(9), tokenizer, file["digest"], StoreOptions(**options), device)
        return
    plan = make_plan(MemoryImages(9), tokenizer, file["digest"], StoreOptions(**options), device)
    assert (plan.device, plan.precision, plan.micro_batch) == recorded


def test_images_without_classes_are_refused(tiny_tokenizer_file: Path) -> None:
    tokenizer, file = model.load(tiny_tokenizer_file)
    source = MemoryImages(9)
    source.labels = None
    with pytest.raises(DataError, match=source.spec):
        make_plan(source, tokenizer, file["digest"], StoreOptions(), CPU)


# ---- a micro-batch -------------------------------------------------------------------------------------------------


@pytest.fixture
def making(tmp_path: Path, tiny_tokenizer_file: Path) -> Callable[..., Making]:
    """making(bad=(), **settings): a store of ten images in memory, in micro-batches of 4."""

    def make(bad: Any = (), **settings: Any) -> Making:
        return Making(tmp_path / "codes", MemoryImages(10, bad), tiny_tokenizer_file, micro_batch=4, **settings)

    return make


def test_bf16_encodes_in_channels_last_and_quantises_in_fp32(making: Callable[..., Making]) -> None:
    """z moves by what bf16 moves, the codes are Q of the z that is kept."""
    one = making(views=1)
    exact, half = one.plan, one.plan.model_copy(update={"precision": "bf16"})
    tokenizer = one.tokenizer.to(memory_format=torch.channels_last)
    batch = write.prepare(one.source, exact, range(4))
    layouts: list[bool] = []

    def note(_: object, __: object, y: Tensor) -> None:
        layouts.append(y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last))

    tokenizer.encoder.conv_in.register_forward_hook(note)
    fp32, bf16 = (write.encode(tokenizer, plan, batch).arrays for plan in (exact, half))
    assert layouts == [False, True]
    a, b = fp32["latents"].astype(np.float32), bf16["latents"].astype(np.float32)
    assert 0 < np.abs(a - b).max() < 0.2
    eps = torch.from_numpy(batch.arrays["eps_VBTCS"][0])
    assert np.array_equal(tokenizer.quantizer.encode(torch.from_numpy(b[:, 0]), eps).numpy(), bf16["codes"][:, 0])
    assert (fp32["codes"] == bf16["codes"]).mean() > 0.9


def test_what_workers_prepare_is_what_one_process_prepares(making: Callable[..., Making]) -> None:
    """The decode workers of a GPU: uint8 pixels and noise, padded; the network stays where it is."""
    one = making(bad=[5])
    plan = one.plan.model_copy(update={"device": "cuda"})
    batches = write.micro_batches(plan, 0)
    single, several = (list(write.encode_all(one.source, one.tokenizer, plan, batches, n)) for n in (1, 2))
    assert [batch.indices for batch in several] == [[0, 1, 2, 3], [4, 6, 7], [8, 9]]
    for a, b in zip(single, several, strict=True):
        assert np.array_equal(a.arrays["codes"], b.arrays["codes"])
        assert a.bad == b.bad


def test_the_other_items_of_a_batch_change_nothing(making: Callable[..., Making]) -> None:
    whole, some, none = (
        write.prepare_and_encode(one.source, one.tokenizer, one.plan, range(4))
        for one in (making(), making(bad=[0, 2]), making(bad=range(4)))
    )
    assert (some.indices, none.indices) == ([1, 3], [])
    assert np.array_equal(whole.arrays["codes"][[1, 3]], some.arrays["codes"])
    assert none.arrays["codes"].shape == (0, 2, 4, 16)
