"""The variables by which torchrun and --gpus tell a process its place among several. Torch-free."""

import os
import re

from rdpm_cli.errors import UsageError

LAUNCHER = "RDPM_LAUNCHER"  # set by --gpus: the launcher's process id
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # it sets all of them, and others


def variables() -> dict[str, str]:
    """Those that are set."""
    return {name: os.environ[name] for name in (*TORCHRUN, "LOCAL_WORLD_SIZE") if name in os.environ}


def fault() -> str:
    """Why the variables describe no place; empty if they do, and if none is set."""
    values = variables()
    if values and (absent := [name for name in TORCHRUN if name not in values]):
        return f"{', '.join(values)} without {', '.join(absent)}"
    for name, value in values.items():
        if name != "MASTER_ADDR" and not re.fullmatch(r"[0-9]{1,9}", value):
            return f"{name}={value} is not a number"
    if values and int(values["RANK"]) >= int(values["WORLD_SIZE"]):
        return f"RANK={values['RANK']} is not below WORLD_SIZE={values['WORLD_SIZE']}"
    return ""


def remedy() -> str:
    """The hint for a fault."""
    return f"unset {' '.join(variables())}, or start by torchrun or --gpus N"


def check() -> None:
    """Raise UsageError for variables that are left over: a command would wait for processes that do not exist."""
    if reason := fault():
        raise UsageError(f"variables of torchrun are left over, incomplete or wrong: {reason}", remedy())


def is_started() -> bool:
    """Whether torchrun or --gpus has started this process."""
    return bool(variables()) and not fault()


def is_first() -> bool:
    """Whether this is the only process, or the first that torchrun or --gpus started."""
    return not is_started() or int(os.environ["RANK"]) == 0
