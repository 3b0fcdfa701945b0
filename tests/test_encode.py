"""Micro-batches: what a plan fixes, the path of a GPU taken on the CPU."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import Making, MemoryImages
from torch import Tensor

from rdpm_cli import workers
from rdpm_cli.codes import write
from rdpm_cli.codes.write import StoreOptions, make_plan
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.tokenizer import model

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
    batch = write.prepare(one.source, one.tokenizer.inputs, exact, range(4))
    layouts: list[bool] = []

    def note(_: object, __: object, y: Tensor) -> None:
        layouts.append(y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last))

    tokenizer.encoder.get_submodule("conv_in").register_forward_hook(note)
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
    single, several = (list(write.encode_all(one.source, one.tokenizer, plan, batches, write.Work(n))) for n in (1, 2))
    assert [batch.indices for batch in several] == [[0, 1, 2, 3], [4, 6, 7], [8, 9]]
    for a, b in zip(single, several, strict=True):
        assert np.array_equal(a.arrays["codes"], b.arrays["codes"])
        assert a.bad == b.bad


def test_a_request_to_stop_ends_the_wait_for_a_read_that_hangs(
    making: Callable[..., Making], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = making(workers=2, stopped=lambda: True)
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(MemoryImages, "open", lambda *_: time.sleep(60))
    start = time.monotonic()
    with contextlib.closing(one.run()) as pieces:
        assert [next(pieces), next(pieces)] == [0, 0]
    assert time.monotonic() - start < 20


def test_the_other_items_of_a_batch_change_nothing(making: Callable[..., Making]) -> None:
    whole, some, none = (
        write.prepare_and_encode(one.source, one.tokenizer, one.plan, range(4))
        for one in (making(), making(bad=[0, 2]), making(bad=range(4)))
    )
    assert (some.indices, none.indices) == ([1, 3], [])
    assert np.array_equal(whole.arrays["codes"][[1, 3]], some.arrays["codes"])
    assert none.arrays["codes"].shape == (0, 2, 4, 16)
