"""rdpm doctor"""

from rdpm_cli.cli import options, report
from rdpm_cli.cli.app import app
from rdpm_cli.errors import DataError


@app.command()
def doctor(json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Say what is here: versions, devices, attention kernels, disk, weight files, extras; a fix line for what is not.

    Exit code 0: commands can run. 3 where something that they need is broken: a package, a GPU that torch cannot use,
    a damaged weight file, half of a launcher's variables. What only some scores or options need may be absent.

    Example: rdpm doctor --json
    """
    report.begin(quiet)
    from rdpm_cli import engine

    result = engine.examine()
    report.show(result, json)
    if broken := result.values["broken"]:
        raise DataError(f"not ready: {', '.join(broken)}", result.values["fix"][broken[0]])
