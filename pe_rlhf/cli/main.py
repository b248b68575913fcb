"""The command line: its commands (one file each in `commands/`), and how they end.

Errors are one sentence and a non-zero exit code; `--debug` shows where they came from.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from contextlib import suppress
from typing import NoReturn

import typer

from pe_rlhf.cli.compare_command import compare
from pe_rlhf.cli.evaluate_command import evaluate
from pe_rlhf.cli.evaluate_reward_command import evaluate_reward
from pe_rlhf.cli.export_command import export
from pe_rlhf.cli.inspect_command import inspect
from pe_rlhf.cli.launch_command import launch
from pe_rlhf.cli.run_command import run
from pe_rlhf.cli.winrate_command import winrate
from pe_rlhf.system.failures import IN_USE, ElsewhereError, Failure, Stopped
from pe_rlhf.system.processes import is_main, launched, openmp_environment

app = typer.Typer(
    name="pe-rlhf",
    help="Parameter-efficient RLHF: preferences → reward model → PPO → win-rate, all roles on one frozen backbone.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

USER_MISTAKE, TRAINING_STOPPED, INTERRUPTED = 2, 3, 130
GOES_ON = {
    "run": ["--resume continues from the last checkpoint"],
    "compare": ["the same command goes on"],
    "evaluate": ["the same command goes on"],
}
SECONDS_FOR_MAIN = 120.0


@app.callback()
def _root() -> None:
    """Without arguments, the help."""


app.command("run")(run)
app.command("launch")(launch)
app.command("compare")(compare)
app.command("evaluate")(evaluate)
app.command("evaluate-reward")(evaluate_reward)
app.command("winrate")(winrate)
app.command("inspect")(inspect)
app.command("export")(export)


def main() -> None:
    """Entry point of `pe-rlhf` and `python -m pe_rlhf`."""
    for name, value in {"TOKENIZERS_PARALLELISM": "false", **openmp_environment()}.items():
        os.environ.setdefault(name, value)
    # Where transformers load DeepSpeed along, it says on stdout, among our results, that there is no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    # DeepSpeed's launcher tells each process its local rank, which is in LOCAL_RANK, too.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    try:
        status = app(args=arguments or ["--help"], standalone_mode=False)
    except typer.TyperException as error:
        _fail(error, USER_MISTAKE)
    except Failure as error:
        # `in_use` has a code of its own: another process has the folder and writes its `failure.json`.
        _fail(error, IN_USE if error.kind == "in_use" else error.exit_code)
    except OSError as error:
        _fail(error, TRAINING_STOPPED)
    except Stopped as stop:
        if not is_main():
            _leave_after_main(stop.code)
        _end(str(stop), stop.code)
    except RuntimeError as error:
        if not _is_another_ranks(error):
            raise
        if is_main() and not isinstance(error, ElsewhereError):
            print("another process has ended; if it says nothing of it, it was killed from outside", file=sys.stderr)
        _leave_after_main(TRAINING_STOPPED)
    else:
        if status == INTERRUPTED:  # what typer makes of Ctrl-C
            print("; ".join(["interrupted", *GOES_ON.get(arguments[0], ())]), file=sys.stderr)
        if launched():
            from pe_rlhf.system.distributed import leave_group

            leave_group()
        sys.exit(status or 0)


def _is_another_ranks(error: RuntimeError) -> bool:
    """Whether this rank fails only because another one has, which tells of it."""
    lost = "closed by peer" in str(error) or "reset by peer" in str(error)
    return launched() and (lost or isinstance(error, ElsewhereError))


def _leave_after_main(code: int) -> NoReturn:
    """End this rank once rank 0 has: the launcher ends them all when one is gone, and rank 0 may have more to do."""
    from pe_rlhf.system.distributed import from_main

    def wait() -> None:
        with suppress(Exception):  # what ends it is that the connection is closed
            from_main(None)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(SECONDS_FOR_MAIN)
    os._exit(code)


def _fail(error: Exception, code: int) -> NoReturn:
    if "--debug" in sys.argv:
        traceback.print_exc()
    where = "" if is_main() else f"rank {os.environ['RANK']}: "
    _end(f"error: {where}{' '.join(_sentence(error).split())}", code)


def _end(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    if launched():
        os._exit(code)  # without waiting for the others in torch's own clean-up; the launcher ends them
    sys.exit(code)


def _sentence(error: Exception) -> str:
    if isinstance(error, typer.TyperException):
        return error.format_message()
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
