"""A vLLM engine in a process of its own: the one place that imports vLLM.

    python -m pe_rlhf.rollout.vllm.worker DESCRIPTOR PARENT FOLDER

`embedded.py` starts it and talks to it over the pipe of that descriptor: it sends `(method, arguments)` and gets
`("result", …)` or `("error", sentence)`, with `("progress", n)` in between. In a process of its own the engine can be
stopped even when it hangs, and it ends with its parent, however that ends.
"""

# vLLM is an extra: this file is checked with and without it.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

# At run time vLLM is imported where it is used: that takes many seconds, in which the watch over the parent runs.
if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

SECONDS_BETWEEN_LOOKS = 0.5


class Sampler:
    """vLLM with one set of weights, and the tag of that set."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._adapter: LoRARequest | None = None
        self._adapters = 0
        self._tag = "anchor"

    def start(self, settings: dict[str, Any]) -> None:
        """Load the base. `settings` are arguments of `vllm.LLM`."""
        from vllm import LLM

        self._llm = LLM(**settings)

    def load_adapter(self, tag: str, path: str) -> None:
        """Sample from a LoRA, under an id and a name that were never used before; drop the one before."""
        from vllm.lora.request import LoRARequest

        self._adapters += 1
        adapter = LoRARequest(tag, self._adapters, path)
        if not self._llm.llm_engine.add_lora(adapter):
            raise RuntimeError(f"vLLM did not load the adapter {tag}")
        self._drop_adapter()
        self._adapter, self._tag = adapter, tag

    def load_merged(self, tag: str, path: str) -> None:
        """Replace the weights by a checkpoint's, and drop the cache of the old ones."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")
        self._tag = tag

    def use_base(self, tag: str) -> None:
        """Sample from the weights without an adapter."""
        self._drop_adapter()
        self._tag = tag

    def generate(
        self, tag: str, prompts: list[list[int]], seeds: list[int], sampling: dict[str, Any]
    ) -> list[tuple[list[int], list[float]]]:
        """Ids and log-probs of one response per prompt, in their order, by the weights of that tag only."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        if tag != self._tag:
            raise RuntimeError(f"the engine holds {self._tag}, it was asked for {tag}")
        engine = self._llm.llm_engine
        for i, (ids, seed) in enumerate(zip(prompts, seeds, strict=True)):
            # The salt separates the prefix caches of two versions a second time, beside their names.
            prompt = TokensPrompt(prompt_token_ids=ids, cache_salt=tag)
            parameters = SamplingParams(seed=seed, logprobs=0, detokenize="stop" in sampling, **sampling)
            engine.add_request(str(i), prompt, parameters, lora_request=self._adapter)
        responses: dict[int, tuple[list[int], list[float]]] = {}
        while engine.has_unfinished_requests():
            finished: list[Any] = [output for output in engine.step() if output.finished]
            for output in finished:
                ids, tables = list(output.outputs[0].token_ids), output.outputs[0].logprobs or []
                # The trainer checks that there is a log-prob for each token.
                logprobs = [table[token].logprob for token, table in zip(ids, tables, strict=False)]
                responses[int(output.request_id)] = ids, logprobs
            if finished:
                self._connection.send(("progress", len(finished)))
        return [responses[i] for i in range(len(prompts))]

    def first_token_logprobs(self, tag: str, prompts: list[list[int]], ids: list[int]) -> list[dict[int, float]]:
        """Log-probs of those ids as the first token after each prompt, by the base; nothing is sampled from them."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        if tag != self._tag:
            raise RuntimeError(f"the engine holds {self._tag}, it was asked for {tag}")
        parameters = SamplingParams(temperature=0.0, max_tokens=1, logprob_token_ids=ids, detokenize=False)
        asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        outputs = self._llm.generate(asked, parameters, use_tqdm=False)
        tables = [(output.outputs[0].logprobs or [{}])[0] for output in outputs]
        return [{i: table[i].logprob for i in ids} for table in tables]

    def sleep(self) -> None:
        """Move the weights to the CPU and free the KV cache; `wake_up` undoes it."""
        self._llm.sleep(level=1)

    def wake_up(self) -> None:
        self._llm.wake_up()

    def _drop_adapter(self) -> None:
        if self._adapter is not None:
            self._llm.llm_engine.remove_lora(self._adapter.lora_int_id)
            self._adapter = None


def _end_with(parent: int, folder: str) -> None:
    """When the parent has gone, remove the folder and end this process and its children."""
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def main() -> None:
    """Serve the parent's calls until it closes the pipe."""
    descriptor, parent, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    threading.Thread(target=_end_with, args=(parent, folder), daemon=True).start()
    connection = Connection(descriptor)
    engine = Sampler(connection)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("result", getattr(engine, method)(**arguments)))
        except Exception as error:
            traceback.print_exc()  # into the log; the parent gets one sentence
            connection.send(("error", f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main()
