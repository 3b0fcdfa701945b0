"""metrics.jsonl and TensorBoard on a full disk."""

import errno
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rdpm_cli.errors import RunError
from rdpm_cli.training.logging import MetricsLog


def thread_error(number: int) -> Any:
    """What Python hands to threading.excepthook."""
    return SimpleNamespace(exc_type=OSError, exc_value=OSError(number, "x"), exc_traceback=None, thread=None)


def test_a_full_disk_is_one_error_that_names_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    log = MetricsLog(tmp_path, 0)
    log.path = Path("/dev/full")
    with pytest.raises(RunError, match="/dev cannot be written") as caught:
        log.write(1, {"loss": 1.0})
    assert "run the same command again" in caught.value.hint
    threading.excepthook(thread_error(errno.ENOSPC))  # of TensorBoard's thread, whose next call raises it again
    assert not told
    threading.excepthook(thread_error(errno.EIO))
    assert len(told) == 1
    log.close()
    assert threading.excepthook == told.append
