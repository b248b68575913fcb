"""The embedded vLLM engine, from the trainer's side: started, given weights, asked for responses, and stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any, NoReturn

import torch

from pe_rlhf.config import BackboneConfig, SamplingConfig
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.roles import ANCHOR
from pe_rlhf.rollout.interface import checked_rollout
from pe_rlhf.rollout.vllm.engine_arguments import card_arguments, engine_arguments
from pe_rlhf.rollout.vllm.exchange import WeightExchange, memory_backed
from pe_rlhf.rollout.vllm.requests import response_seeds, sampling_parameters, sync_mode, vllm_rank
from pe_rlhf.system.distributed import world_size
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.processes import openmp_environment
from pe_rlhf.system.progress import Advance, no_progress, say
from pe_rlhf.types import Rollout
from reward.errors import InputError

SECONDS_TO_END = 10.0
# A process with these variables is a rank of the trainer; the engine is not one.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class EmbeddedVLLM:
    """Samples from a role by a vLLM engine in a process beside this one.

    The process starts here. On a CPU it is ready at the first `sync`, so that it loads while the trainer does other
    things; on a GPU, here. It ends with `close`, or with this process.

    Args:
        longest_prompt: in tokens; with the response's limit it is the engine's context and, times the batch, its cache.
        log: the file for vLLM's output.
        on_progress: gets the number of finished responses.
        reserved: bytes of a GPU that the trainer needs by its plan, now or later.
    """

    def __init__(
        self,
        backbone: Backbone,
        role: str,
        config: SamplingConfig,
        settings: BackboneConfig,
        *,
        longest_prompt: int,
        log: Path,
        on_progress: Advance | None = None,
        reserved: float = 0.0,
    ) -> None:
        self._backbone, self._role, self._config, self._log = backbone, role, config, log
        self._on_progress = on_progress or no_progress
        self._merges = sync_mode(config, backbone) == "merged"
        self._rank = None if self._merges or role == ANCHOR else vllm_rank(backbone)
        self._arguments = engine_arguments(backbone, config, settings, longest_prompt, self._rank)
        self._longest, self._reserved = longest_prompt + config.max_new_tokens, reserved
        size = sum(p.nbytes for p in backbone.model.parameters()) if self._merges else 1 << 28
        self._exchange = WeightExchange(memory_backed(size, otherwise=log.parent))
        self._sleeps = config.sleep and backbone.device.type == "cuda"
        self._version, self._tag, self._holds_base = 0, "", True
        self._start()
        if backbone.device.type == "cuda":
            # It measures the card's free memory while it loads: nobody may take or free any until it is done.
            self._wait_until_loaded()
            self._fall_asleep()  # nobody samples before `sync`; a judge's engine may be next

    def sync(self, version: int, role: str | None = None) -> None:
        self._role, self._version = role or self._role, version
        try:
            self._wake_up()
            self._put_weights()
        except EngineDied as death:
            self._restart(death)

    def generate(self, prompts: list[list[int]], seed: int, rows: Sequence[int] | None = None) -> Rollout:
        """One response per prompt. An engine that dies on the way is started again, once."""
        seeds = response_seeds(seed, prompts, rows)
        try:
            responses = self._ask(prompts, seeds)
        except EngineDied as death:
            self._restart(death)
            responses = self._ask(prompts, seeds)
        return self._checked(prompts, responses)

    def begin(self, prompts: list[list[int]], seed: int, rows: Sequence[int] | None = None) -> Callable[[], Rollout]:
        """As `generate`, while this process goes on. An engine that dies on the way is started again by `sync`."""
        self._send_batch(prompts, response_seeds(seed, prompts, rows))
        return lambda: self._checked(prompts, self._process.answer(self._config.timeout))

    def _checked(self, prompts: list[list[int]], responses: list[tuple[list[int], list[float]]]) -> Rollout:
        try:
            return checked_rollout(prompts, responses, self._version, self._backbone, self._config)
        except ValueError as error:
            raise TrainingError(f"vLLM gave a wrong answer: {error}", kind="process", file=self._log) from error

    def close(self) -> None:
        self._process.close()
        self._exchange.close()

    def _start(self) -> None:
        arguments = self._arguments
        if self._backbone.device.type == "cuda":
            torch.cuda.empty_cache()  # vLLM asks the card what is free, and torch keeps what it has freed
            card = torch.cuda.mem_get_info(self._backbone.device)
            arguments = arguments | card_arguments(self._backbone, self._config, self._longest, card, self._reserved)
        environment = engine_environment(self._backbone.device, self._config.tensor_parallel_size)
        self._process = EngineProcess(self._log, self._exchange.folder, environment, self._on_progress)
        self._process.send("start", settings=arguments)
        self._loading, self._asleep, self._holds_base = True, False, True

    def _restart(self, death: EngineDied) -> None:
        """Start another engine instead of one that died, unless that one could not even be started."""
        if self._loading:
            raise death
        say(f"{death}; it is started again")
        self._start()
        self._put_weights()

    def _put_weights(self) -> None:
        """Give the engine the role as it is now, under a name that no other state ever had.

        vLLM would answer from the prefix cache of the old state under the old name (vllm issue 42125).
        """
        self._wait_until_loaded()
        old, self._tag = self._tag, f"{self._role}-{self._version}-{os.urandom(4).hex()}"
        if not self._merges and self._role != ANCHOR:
            path = self._exchange.put_adapter(self._backbone, self._role, self._tag, self._rank or 0)
            self._call("load_adapter", tag=self._tag, path=str(path))
        elif self._role == ANCHOR and self._holds_base:
            self._call("use_base", tag=self._tag)
        else:
            path = self._exchange.put_merged(self._backbone, self._role, self._tag)
            self._call("load_merged", tag=self._tag, path=str(path))
            self._exchange.drop(self._tag)
            self._holds_base = self._role == ANCHOR
        if old:
            self._exchange.drop(old)

    def _wait_until_loaded(self) -> None:
        if self._loading:
            say(f"waiting for vLLM to start; its output goes to {self._log}")
            self._process.answer(self._config.start_timeout)
            self._loading = False

    def _ask(self, prompts: list[list[int]], seeds: list[int]) -> list[tuple[list[int], list[float]]]:
        self._wake_up()
        self._send_batch(prompts, seeds)
        responses = self._process.answer(self._config.timeout)
        self._fall_asleep()
        return responses

    def _send_batch(self, prompts: list[list[int]], seeds: list[int]) -> None:
        sampling = sampling_parameters(self._config, self._backbone.eos_token_ids)
        self._process.send("generate", tag=self._tag, prompts=prompts, seeds=seeds, sampling=sampling)

    def _fall_asleep(self) -> None:
        if self._sleeps:
            self._call("sleep")
            self._asleep = True

    def _wake_up(self) -> None:
        if self._asleep:
            # The engine wakes up in the memory that torch's cache still holds for the trainer.
            torch.cuda.empty_cache()
            self._call("wake_up")
            self._asleep = False

    def _call(self, method: str, **arguments: Any) -> Any:
        self._process.send(method, **arguments)
        return self._process.answer(self._config.timeout)


class EngineDied(TrainingError):
    """The engine's process has ended by itself."""


class EngineProcess:
    """The process of `worker.py` and the pipe to it."""

    def __init__(
        self, log: Path, folder: Path, environment: dict[str, str], on_progress: Advance = no_progress
    ) -> None:
        self._log, self._on_progress = log, on_progress
        self._pipe, theirs = Pipe()
        # -P: the working directory may hold a folder with the name of a library, which must not be imported.
        command = [
            sys.executable,
            "-P",
            "-m",
            "pe_rlhf.rollout.vllm.worker",
            str(theirs.fileno()),
            str(os.getpid()),
            str(folder),
        ]
        with log.open("ab") as file:
            # A session of its own: Ctrl-C goes to the trainer only, which then ends the engine and its children.
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, method: str, **arguments: Any) -> None:
        try:
            self._pipe.send((method, arguments))
        except OSError:
            self._raise_death()

    def answer(self, timeout: float) -> Any:
        """The result of the last call. Raises `TrainingError` for an error, and after `timeout` s without progress."""
        while True:
            try:
                if not self._pipe.poll(timeout):
                    self.close()
                    raise TrainingError(
                        f"vLLM did not answer for {timeout:g} s and was stopped",
                        kind="process",
                        file=self._log,
                        fix=f"see {self._log}, or raise the timeout",
                    )
                kind, value = self._pipe.recv()
            except (EOFError, OSError):
                self._raise_death()
            if kind == "progress":
                self._on_progress(value)
            elif kind == "error":
                said, full = f"vLLM stopped with an error: {value}", "OutOfMemory" in value
                fix = f"see {self._log}" + (", and lower gpu_memory_share or batch_size" if full else "")
                raise TrainingError(said, kind="memory" if full else "process", file=self._log, fix=fix)
            else:
                return value

    def close(self) -> None:
        """Kill the process and its children; it has nothing to save."""
        self._pipe.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _raise_death(self) -> NoReturn:
        """Say how the process ended. It may still be ending: the system closes its pipe before the process is gone."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(SECONDS_TO_END)
        self.close()
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise EngineDied(f"the vLLM engine {how}", kind="process", file=self._log, fix=f"see {self._log}")


def engine_environment(device: torch.device, gpus: int = 1) -> dict[str, str]:
    """The environment of the engine: that of this process without the variables of a rank, with vLLM's own.

    It sees `gpus` GPUs, the trainer's first and then those after it, of which the last is followed by the first. Raises
    `InputError` where there are not as many, and where other ranks have them.
    """
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES and not k.startswith("TORCHELASTIC_")}
    root = str(Path(__file__).parents[3])
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH")))),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in our process and needs no other
        "VLLM_NO_USAGE_STATS": "1",
        # Engines of several ranks look for a free port at the same time: each in a range of its own.
        "VLLM_PORT": str(20000 + 100 * int(os.environ.get("LOCAL_RANK", "0"))),
        # As many threads as the trainer has, on any core: vLLM's own binding leaves one of two cores idle.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        **openmp_environment(),
    }
    if device.type == "cuda":
        named = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        index = device.index or 0
        if gpus > 1:
            _check_gpus(gpus, len(named) or torch.cuda.device_count())
        visible = named or [str(i) for i in range(max(torch.cuda.device_count(), index + 1))]
        wanted = [(index + i) % len(visible) for i in range(gpus)] if gpus > 1 else [index]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[i] if i < len(visible) else str(i) for i in wanted)
    elif gpus > 1:
        _check_gpus(gpus, 0)
    return environment


def _check_gpus(wanted: int, there: int) -> None:
    if wanted > there or world_size() > 1:
        has = f"{there} GPUs are there" if wanted > there else f"{world_size()} processes share the GPUs"
        raise InputError(
            f"tensor_parallel_size: {wanted}, and {has}",
            kind="conflict",
            key="tensor_parallel_size",
            fix="use mode: server, with servers on GPUs of their own",
        )
