"""The command line: its commands, one file each, and how they end.

Errors are one sentence and a non-zero exit code; `--debug` shows where they came from.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from pe_rlhf import __version__
from pe_rlhf.cli.compare_command import compare
from pe_rlhf.cli.doctor_command import doctor
from pe_rlhf.cli.evaluate_command import evaluate
from pe_rlhf.cli.evaluate_reward_command import evaluate_reward
from pe_rlhf.cli.export_command import export
from pe_rlhf.cli.inspect_command import inspect
from pe_rlhf.cli.launch_command import launch
from pe_rlhf.cli.recipes_command import recipes
from pe_rlhf.cli.run_command import run
from pe_rlhf.cli.serve_reward_command import serve_reward
from pe_rlhf.cli.winrate_command import winrate
from pe_rlhf.system.failures import IN_USE, ElsewhereError, Failure, Stopped
from pe_rlhf.system.processes import is_main, launched, openmp_environment
from reward.errors import InputError

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


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pe-rlhf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Without arguments, the help."""


app.command("run")(run)
# Options that it does not know are `run`'s, which checks them.
app.command("launch", context_settings={"ignore_unknown_options": True})(launch)
app.command("compare")(compare)
app.command("evaluate")(evaluate)
app.command("evaluate-reward")(evaluate_reward)
app.command("serve-reward")(serve_reward)
app.command("winrate")(winrate)
app.command("inspect")(inspect)
app.command("export")(export)
app.command("recipes")(recipes)
app.command("doctor")(doctor)


def main() -> None:
    """Entry point of `pe-rlhf` and `python -m pe_rlhf`."""
    for name, value in {"TOKENIZERS_PARALLELISM": "false", **openmp_environment()}.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries: in a log each of their updates is a line
    # When transformers imports DeepSpeed, it says on stdout, among our results, that there is no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    # It is imported along with PEFT and asks for a package that would make 4-bit bases faster on a CPU.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # DeepSpeed's launcher passes each process its local rank, which LOCAL_RANK says already.
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
        from pe_rlhf.system.distributed import late_rank

        if (late := late_rank(error)) is not None:
            _fail(late, TRAINING_STOPPED)
        if not _is_another_ranks(error):
            _fail_in_users_code(error)
        if is_main() and not isinstance(error, ElsewhereError):
            print("another process has ended; if it printed no error, it was killed from outside", file=sys.stderr)
        _leave_after_main(TRAINING_STOPPED)
    except BaseException as error:
        if _reader_has_gone(error):
            sys.exit(128 + signal.SIGPIPE)  # as a command ends that knows nothing of it
        _fail_in_users_code(error)
    else:
        if status == INTERRUPTED:  # typer returns it for Ctrl-C
            print("; ".join(["interrupted", *GOES_ON.get(arguments[0], ())]), file=sys.stderr)
        if launched():
            from pe_rlhf.system.distributed import leave_group

            leave_group()
        sys.exit(status or 0)


def _reader_has_gone(error: BaseException) -> bool:
    """Whether nobody reads what is printed any more, as in `pe-rlhf recipes | head -1`; click then calls `sys.exit`."""
    cause = error.__context__ if isinstance(error, SystemExit) else None
    return isinstance(cause, OSError) and cause.errno == errno.EPIPE


def _fail_in_users_code(error: BaseException) -> NoReturn:
    """End with a sentence where code of the user's has raised, a kind of adapter for example; other errors are ours.

    No command of ours calls `sys.exit`, so whoever does would end the run in silence.
    """
    from reward.judges.user_code import LIBRARIES, OURS

    known = (*LIBRARIES, OURS, str(Path(__file__).parents[1]), "<")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(known)]
    if not frames and not isinstance(error, SystemExit):
        raise error
    place = f" ({Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else ""
    said = " ".join([f"{type(error).__name__}:", *map(str, error.args)])
    file = frames[-1].filename if frames else None
    _fail(InputError(f"code that is not ours raised {said}{place}", kind="user_code", file=file), USER_MISTAKE)


def _is_another_ranks(error: RuntimeError) -> bool:
    """Whether this rank fails only because another one has, which reports the error."""
    lost = "closed by peer" in str(error) or "reset by peer" in str(error)
    return launched() and (lost or isinstance(error, ElsewhereError))


def _leave_after_main(code: int) -> NoReturn:
    """End this rank after rank 0: the launcher kills all ranks when one is gone, and rank 0 may still be saving."""
    from pe_rlhf.system.distributed import from_main

    def wait() -> None:
        with suppress(Exception):  # it ends when rank 0 closes the connection
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
        os._exit(code)  # torch's clean-up would wait for the other ranks, which the launcher ends
    sys.exit(code)


def _sentence(error: Exception) -> str:
    if isinstance(error, typer.TyperException):
        return error.format_message()
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
