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

from rdpm_cli.codes import encode
from rdpm_cli.codes.encode import StoreOptions, in_order, make_plan, report_killed_worker
from rdpm_cli.codes.store import Plan
from rdpm_cli.errors import DataError, ImageError, RdpmError, RunError, UsageError
from rdpm_cli.tokenizer import model

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def numbers(count: int) -> list[range]:
    """Micro-batches of one item."""
    return [range(i, i + 1) for i in range(count)]


# ---- workers -------------------------------------------------------------------------------------------------------


def slow_square(batch: range) -> int:
    time.sleep(0.02 if batch.start % 3 == 0 else 0.0)  # results come out of order
    return batch.start**2


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_come_in_the_order_of_the_batches(workers: int) -> None:
    assert list(in_order(slow_square, numbers(40), workers)) == [n * n for n in range(40)]
    assert list(in_order(slow_square, [], workers)) == []


def process_id(batch: range) -> int:
    time.sleep(0.01)
    return os.getpid()


@pytest.mark.parametrize(("workers", "batches", "processes"), [(3, 60, 3), (64, 2, 2), (1, 4, 0)])
def test_the_work_is_shared_by_this_number_of_processes(workers: int, batches: int, processes: int) -> None:
    pids = set(in_order(process_id, numbers(batches), workers)) - {os.getpid()}
    assert len(pids) == processes
    assert not any(alive(pid) for pid in pids)


def threads(batch: range) -> int:
    return torch.get_num_threads()


def test_a_worker_has_one_thread() -> None:
    assert set(in_order(threads, numbers(4), 2)) == {1}


def test_workers_end_with_the_iterator_in_the_middle_of_their_work() -> None:
    results = in_order(lambda batch: time.sleep(batch.start), [range(0, 1), *numbers(100)[50:]], 2)
    next(results)
    pids = [child.pid for child in multiprocessing.active_children()]
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 2
    assert not any(alive(pid) for pid in pids if pid)


def test_large_arrays_pass() -> None:
    results = in_order(lambda batch: np.full((300, 3000), batch.start), numbers(8), 2)
    assert [result[-1, -1] for result in results] == list(range(8))


ERRORS: list[RdpmError] = [
    ImageError("image 5", "copy it", name="5.png", reason="torn"),
    DataError("shard 5", "fetch it"),
    RunError("disk 5"),
]


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
    assert caught.value.exit_code == 1
    assert "--workers" in caught.value.hint


def note_and_wait(folder: str, batch: range) -> None:
    (Path(folder) / str(batch.start)).write_text(str(os.getpid()))
    time.sleep(60)


def lead(folder: str) -> None:
    """Be a process with two workers that take long."""
    list(in_order(lambda batch: note_and_wait(folder, batch), numbers(2), 2))


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


def plan_of(tokenizer_file: Path, device: torch.device, **options: Any) -> Plan:
    tokenizer, file = model.load(tokenizer_file)
    return make_plan(MemoryImages(9), tokenizer, file["digest"], StoreOptions(**options), device)


@pytest.mark.parametrize(
    ("options", "token"),
    [
        ({"micro_batch": 4}, "--micro-batch"),
        ({"precision": "bf16"}, "--precision"),
        ({"flip": True, "views": 3}, "--views"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], token: str, tiny_tokenizer_file: Path) -> None:
    with pytest.raises(UsageError) as caught:
        plan_of(tiny_tokenizer_file, CPU, **options)
    assert token in caught.value.message


@pytest.mark.parametrize(
    ("device", "options", "recorded"),
    [
        (CPU, {"precision": "fp32"}, ("cpu", "fp32", 128)),
        (CUDA, {}, ("cuda", "bf16", 1024)),
        (CUDA, {"precision": "fp32", "micro_batch": 6}, ("cuda", "fp32", 6)),
    ],
)
def test_a_plan_records_device_precision_and_micro_batch(
    device: torch.device, options: dict[str, Any], recorded: tuple[str, str, int], tiny_tokenizer_file: Path
) -> None:
    plan = plan_of(tiny_tokenizer_file, device, **options)
    assert (plan.device, plan.precision, plan.micro_batch) == recorded


def test_images_without_classes_are_refused(tiny_tokenizer_file: Path) -> None:
    tokenizer, file = model.load(tiny_tokenizer_file)
    source = MemoryImages(9)
    source.labels = None
    with pytest.raises(DataError) as caught:
        make_plan(source, tokenizer, file["digest"], StoreOptions(), CPU)
    assert source.spec in caught.value.message


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
    batch = encode.prepare(one.source, exact, range(4))
    layouts: list[bool] = []
    dtypes: list[torch.dtype] = []

    def note(_: object, __: object, y: Tensor) -> None:
        layouts.append(y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last))

    tokenizer.encoder.conv_in.register_forward_hook(note)
    tokenizer.quantizer.register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))
    fp32, bf16 = encode.encode(tokenizer, exact, batch), encode.encode(tokenizer, half, batch)
    assert layouts == [False, True]
    assert dtypes == [torch.float32, torch.float32]
    assert fp32.latents is not None
    assert bf16.latents is not None
    assert batch.eps_VBTCS is not None
    a, b = fp32.latents.astype(np.float32), bf16.latents.astype(np.float32)
    assert 0 < np.abs(a - b).max() < 0.2
    fresh = tokenizer.quantizer.encode(torch.from_numpy(b[:, 0]), torch.from_numpy(batch.eps_VBTCS[0]))
    assert np.array_equal(fresh.numpy(), bf16.codes[:, 0])
    assert (fp32.codes == bf16.codes).mean() > 0.9


def test_what_workers_prepare_is_what_one_process_prepares(making: Callable[..., Making]) -> None:
    """The decode workers of a GPU: uint8 pixels and noise, padded; the network stays where it is."""
    one = making(bad=[5])
    plan = one.plan.model_copy(update={"device": "cuda"})
    batches = encode.micro_batches(plan, 0)
    alone, several = (list(encode.encode_all(one.source, one.tokenizer, plan, batches, n)) for n in (1, 2))
    assert [batch.indices for batch in several] == [[0, 1, 2, 3], [4, 6, 7], [8, 9]]
    for a, b in zip(alone, several, strict=True):
        assert np.array_equal(a.codes, b.codes)
        assert a.bad == b.bad


def test_the_other_items_of_a_batch_change_nothing(making: Callable[..., Making]) -> None:
    whole, some = making(), making(bad=[0, 2])
    batch = range(4)
    a, b = (encode.prepare_and_encode(one.source, one.tokenizer, one.plan, batch) for one in (whole, some))
    assert b.indices == [1, 3]
    assert np.array_equal(a.codes[[1, 3]], b.codes)
    none = making(bad=range(4))
    assert encode.prepare_and_encode(none.source, none.tokenizer, none.plan, batch).codes.shape == (0, 2, 4, 16)
