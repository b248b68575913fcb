"""A user's functions: how they are found, checked and called, so that nothing they do ends the run without a word.

Whatever one raises (`sys.exit` too), prints to a closed stream or returns in another form is one `InputError` that
names the user's file and line. A call that takes long is mentioned, and one that never ends is given up.
"""

import importlib
import inspect
import os
import pkgutil
import queue
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from reward.errors import Failure, InputError, did_you_mean

LIMIT_KEY = "function_timeout"  # of a recipe, and of `pe-rlhf evaluate`
LIMIT_VARIABLE = "PE_RLHF_FUNCTION_TIMEOUT"  # where the key is left out
USUAL_LIMIT = 3600.0  # seconds of one call
FIRST_WORD = 60.0  # seconds until it is said who is being waited for; the next times after twice as long
LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
OURS = str(Path(__file__).parents[1])


_given: float | None = None  # seconds, by `time_limit`


class _TooLong(BaseException):
    """A call is over its time limit; no `except Exception` of the user's catches it."""


def call_users_code(name: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What the user's function returns; `name` is what messages call it.

    It gets copies of lists and dicts, which it may change, and may change the working directory, which is put back.
    Raises `InputError` for whatever it raises, and after the seconds of `time_limit` or `PE_RLHF_FUNCTION_TIMEOUT`. Our
    own failures and Ctrl-C pass as they are.
    """
    limit = _limit()
    arguments, named = _copy(arguments), _copy(named)
    try:
        with _waiting(name), _kept_folder:
            if threading.current_thread() is threading.main_thread():
                with _alarm(limit):
                    returned = function(*arguments, **named)
            else:
                returned = _worker().call(partial(function, **named), arguments, limit)
    except (Failure, KeyboardInterrupt):
        raise
    except _TooLong as error:
        fix = f"make it faster, or raise {LIMIT_KEY}"
        raise _failed(f"{name} has not returned for {limit:g} s{place_of(function)}", function, fix) from error
    except BaseException as error:
        raise _failed(f"{name} raised {describe(error, function)}", function) from error
    finally:
        closed = _reopen_streams()
    if closed:
        raise _failed(f"{name} has closed {closed}{place_of(function)}", function)
    return returned


def _copy(value: Any) -> Any:
    """Lists and dicts of ours for a function that may sort, fill or clear them: it changes only its own."""
    if type(value) is dict:
        return {key: _copy(part) for key, part in value.items()}
    return type(value)(map(_copy, value)) if type(value) in (list, tuple) else value


class _KeptFolder:
    """The working directory is as it was before, once the calls that run at the same time have ended."""

    def __init__(self) -> None:
        self._lock, self._calls, self._path = threading.Lock(), 0, ""

    def __enter__(self) -> None:
        with self._lock:
            if not self._calls:
                self._path = ""
                with suppress(OSError):  # somebody has removed it
                    self._path = os.getcwd()
            self._calls += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._calls -= 1
            with suppress(OSError):
                os.chdir(self._path)


_kept_folder = _KeptFolder()


def load_function(path: str) -> Callable[..., Any]:
    """Import what "module:callable" names; modules in the working directory are found too.

    Raises `InputError` where the text has another form, the module or the name in it does not exist (with the nearest
    one that does), the module needs a package that is not installed, or the name is not callable.
    """
    module_name, _, function_name = path.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise InputError(f"{path!r} does not name a function as 'module:callable'", kind="invalid")
    # A console script does not look for modules in the working directory. It comes last, so it hides no package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = call_users_code(repr(path), _import, path, module_name)
    except InputError as error:
        error.file = error.file or _file_of(module_name)
        raise
    found = call_users_code(repr(path), lambda: (hasattr(module, function_name), getattr(module, function_name, None)))
    if not found[0]:
        nearest = did_you_mean(function_name, dir(module))
        file = getattr(module, "__file__", None)
        raise InputError(f"module {module_name!r} has no {function_name!r}", kind="unknown", file=file, fix=nearest)
    if not callable(found[1]):
        raise InputError(
            f"{path!r} is not callable but {type(found[1]).__name__}",
            kind="user_code",
            file=getattr(module, "__file__", None),
        )
    return found[1]


def check_arguments(path: str, function: Callable[..., Any], *names: str, named: Collection[str] = ()) -> None:
    """Raise `InputError` where a function cannot be called with that many arguments, `names` in their order, and with
    those that are `named`."""
    try:
        inspect.signature(function).bind(*names, **dict.fromkeys(named))
    except TypeError as error:
        message = f"{path!r} cannot be called with ({', '.join([*names, *named])}): {error}{place_of(function)}"
        raise _failed(message, function) from error
    except ValueError:  # some builtins have no signature
        return


def place_of(function: Any) -> str:
    """` (FILE line N)` of a function that a user wrote; "" where that is not known."""
    try:
        code = inspect.unwrap(function).__code__
    except (AttributeError, ValueError):
        code = getattr(vars(type(function)).get("__call__"), "__code__", None)
    return "" if code is None else f" ({Path(code.co_filename).name} line {code.co_firstlineno})"


def describe(error: BaseException, function: Any = None) -> str:
    """The kind of an exception, what it says, and the last line of the user's own that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(OURS)]
    own = [frame for frame in frames if not frame.filename.startswith((*LIBRARIES, "<"))]
    shown = (own or frames)[-1:]
    place = f" ({Path(shown[0].filename).name} line {shown[0].lineno})" if shown else place_of(function)
    try:
        said = str(error)
    except Exception:  # an exception of the user's own
        said = ""
    return f"{type(error).__name__}{f': {said}' if said else ''}{place}"


def source_of(function: Any) -> str | None:
    """The file of a function that a user wrote; None where that is not known."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except (TypeError, ValueError):
        return None
    return None if file and file.startswith(OURS) else file


def _failed(message: str, function: Any, fix: str | None = None) -> InputError:
    return InputError(message, kind="user_code", file=source_of(function), fix=fix)


def _import(path: str, module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if f"{module_name}.".startswith(f"{missing}."):
            raise InputError(
                f"{path!r} names the module {missing!r}, which is neither installed nor in the working directory",
                kind="unknown",
                fix=did_you_mean(missing, _modules_beside(missing)),
            ) from error
        raise InputError(
            f"{path!r} needs the package {missing!r}, which is not installed", kind="not_installed"
        ) from error
    except (KeyboardInterrupt, _TooLong):
        raise
    except BaseException as error:  # the module is the user's: its top level can raise anything
        raise InputError(f"{path!r} cannot be imported: it raised {describe(error)}", kind="user_code") from error


def _file_of(module_name: str) -> str | None:
    """The file of a module that could not be imported, where there is one in the working directory."""
    path = Path(*module_name.split(".")).with_suffix(".py")
    return str(path.resolve()) if path.is_file() else None


def _modules_beside(name: str) -> list[str]:
    """The modules that there are in the place where `name` is not."""
    parent = name.rpartition(".")[0]
    folders = getattr(sys.modules[parent], "__path__", []) if parent else None  # None: all of sys.path
    prefix = f"{parent}." if parent else ""
    return [prefix + module.name for module in pkgutil.iter_modules(folders)]


def _reopen_streams() -> str:
    """Put something open in the place of stdout and stderr that were closed, and say which one was."""
    closed = [name for name in ("stdout", "stderr") if getattr(sys, name) is not None and getattr(sys, name).closed]
    for name in closed:
        own = getattr(sys, f"__{name}__")
        setattr(sys, name, own if own is not None and not own.closed else Path(os.devnull).open("w"))  # noqa: SIM115
    return " and ".join(closed)


# ---- time ------------------------------------------------------------------------------------------------------------


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """The limit of every call within the block, on all threads; None changes nothing."""
    global _given
    before, _given = _given, _given if seconds is None else seconds
    try:
        yield
    finally:
        _given = before


def _limit() -> float:
    if _given is not None:
        return _given
    said = os.environ.get(LIMIT_VARIABLE, str(USUAL_LIMIT))
    try:
        limit = float(said)
    except ValueError:
        limit = -1.0
    if not 0 < limit < threading.TIMEOUT_MAX:
        raise InputError(
            f"{LIMIT_VARIABLE}={said} is not a number of seconds above 0", kind="invalid", key=LIMIT_VARIABLE
        )
    return limit


@contextmanager
def _waiting(name: str) -> Iterator[None]:
    """Say on stderr who is being waited for, while the block takes long."""
    over = threading.Event()

    def watch() -> None:
        start, pause = time.monotonic(), FIRST_WORD
        while not over.wait(pause):
            print(f"waiting for {name}, {time.monotonic() - start:.0f} s so far", file=sys.stderr, flush=True)
            pause *= 2

    threading.Thread(target=watch, daemon=True, name="waiting").start()
    try:
        yield
    finally:
        over.set()


@contextmanager
def _alarm(limit: float) -> Iterator[None]:
    """Raise `_TooLong` in the block, in the main thread, also while it sleeps; the user's own alarm takes its place."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Worker:
    """A thread that calls functions for another one, which can stop waiting for it.

    It is the same thread for every call: what a function opened in one, a database for example, it can use in the next.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name="user code").start()

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...], limit: float) -> Any:
        answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        self._calls.put((function, arguments, answers))
        try:
            is_good, value = answers.get(timeout=limit)
        except queue.Empty:
            _workers.__dict__.pop("own", None)  # that thread is lost; the process does not wait for it
            raise _TooLong from None
        if not is_good:
            raise value
        return value

    def _run(self) -> None:
        while True:
            function, arguments, answers = self._calls.get()
            try:
                answers.put((True, function(*arguments)))
            except BaseException as error:
                answers.put((False, error))
            function, arguments, answers = None, None, None  # nothing of a call is kept until the next


_workers = threading.local()


def _worker() -> _Worker:
    if not hasattr(_workers, "own"):
        _workers.own = _Worker()
    return _workers.own
