"""A scorer behind HTTP: prompts and responses in, scores out. The protocol is in docs/rewards.md.

A temporary failure (a dropped connection, a time-out, 5xx, a body that is no JSON) is tried again after a growing
pause. What a server says well-formed and wrong (another number of scores, NaN) is refused at once.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import torch
from torch import Tensor

from pe_rlhf.config.reward_source import ScoreServer
from pe_rlhf.system.distributed import on_main
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.types import Sequences
from reward.errors import InputError, Kind
from reward.judges.bounded import TooLongError, ended
from reward.judges.functions import as_number
from reward.judges.judge_settings import key_in
from reward.judges.server_errors import Passing, retry_after, without_key
from reward.records import NO_COLUMNS, Columns, Prompt

KEY = "ppo.reward.url"
LONGEST_PAUSE = 60.0  # seconds between two tries, unless the server asks for more, up to ten minutes


class RemoteScorer:
    """Asks a server, on rank 0, in batches of which several are under way at the same time.

    `eos_token_ids` are the policy's: a response that does not end with one was cut, and the request says so.
    """

    def __init__(self, url: str, settings: ScoreServer, eos_token_ids: list[int]) -> None:
        self._url, self._settings, self._eos_token_ids = url.rstrip("/"), settings, torch.tensor(eos_token_ids)
        self._stopped = threading.Event()
        self._key = _api_key(settings)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        self._client = ended(httpx.Client(headers=headers, timeout=settings.timeout))

    def check_server(self) -> None:
        """Raise `TrainingError` where nothing answers at the address: before anything is sampled."""
        self._until_answered("GET", "/health", None)

    def score(
        self, prompts: list[Prompt], responses: list[str], sequences: Sequences, columns: Columns = NO_COLUMNS
    ) -> Tensor:
        cut = was_cut(sequences, self._eos_token_ids)
        sent = {name: columns[name] for name in self._settings.columns}
        rows = {"prompts": prompts, "responses": responses, "cut": cut}
        return torch.tensor(on_main(lambda: self._scores(rows, sent, len(responses))))

    def _scores(self, rows: dict[str, Any], columns: dict[str, Any], count: int) -> list[float]:
        size = self._settings.batch_size
        self._stopped.clear()
        with ThreadPoolExecutor(self._settings.concurrency) as pool:
            try:
                batches = [pool.submit(self._batch, rows, columns, i, size) for i in range(0, count, size)]
                return [score for batch in batches for score in batch.result()]
            except BaseException:
                self._stopped.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _batch(self, rows: dict[str, Any], columns: dict[str, Any], start: int, size: int) -> list[float]:
        part = slice(start, start + size)
        body: dict[str, Any] = {name: values[part] for name, values in rows.items()}
        if columns:
            body["columns"] = {name: list(values[part]) for name, values in columns.items()}
        # ASCII: a response that was cut within a character may hold half of one, which UTF-8 has no bytes for.
        answer = self._until_answered("POST", "/score", json.dumps(body, default=str).encode())
        return self._checked(answer, len(body["responses"]), start)

    def _checked(self, answer: Any, count: int, start: int) -> list[float]:
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise self._refused(f"answered without a list of scores: {str(answer)[:80]!r}")
        if len(scores) != count:
            raise self._refused(f"answered {len(scores)} scores for {count} responses")
        numbers: list[float] = []
        for row, score in enumerate(scores, start=start + 1):
            number = None if isinstance(score, bool) else as_number(score)
            if number is None:
                raise self._refused(f"answered {str(score)[:80]!r} for response {row}, not a number", row=row)
            if not math.isfinite(number):
                raise self._refused(
                    f"answered {number} for response {row}, not a finite number", row=row, kind="not_finite"
                )
            numbers.append(number)
        return numbers

    def _until_answered(self, method: str, route: str, body: bytes | None) -> Any:
        """What the server answers, as JSON. Raises `TrainingError` after the last try, or for what a try won't mend."""
        tries = 0
        while True:
            try:
                return self._ask_once(method, route, body)
            except Passing as error:
                tries += 1
                pause = min(LONGEST_PAUSE, 0.5 * 2.0 ** (tries - 1)) if error.pause is None else error.pause
                if tries >= self._settings.attempts or self._stopped.wait(pause):
                    raise self._refused(
                        f"failed {tries} {'time' if tries == 1 else 'times'}, the last time: {error}",
                        fix="look at the server, or raise ppo.reward.server.attempts or ppo.reward.server.timeout",
                    ) from None

    def _ask_once(self, method: str, route: str, body: bytes | None) -> Any:
        try:
            response = self._client.request(method, f"{self._url}{route}", content=body)
        except (httpx.TimeoutException, TimeoutError):
            raise Passing(f"no answer within {self._settings.timeout:g} s") from None
        except TooLongError as error:
            raise self._refused(f"answers {error}") from None
        except httpx.InvalidURL as error:
            raise self._refused(f"is not an address: {error}") from None
        except httpx.HTTPError as error:
            raise Passing(f"the connection failed: {error or type(error).__name__}") from None
        status = response.status_code
        if method == "GET":  # somebody answers; a server of the user's need not have this page
            return None
        said = " ".join(response.content.decode("utf-8", "replace").split())[:300]
        if status in (408, 425, 429) or status >= 500:
            raise Passing(f"status {status}: {said}".rstrip(": "), retry_after(response.headers))
        if status != 200:
            raise self._refused(f"refuses the request (status {status}): {said}")
        try:
            return json.loads(response.content)
        except (ValueError, RecursionError):
            raise Passing(f"an answer that is not JSON: {said[:80]!r}" if said else "an empty answer") from None

    def _refused(
        self, what: str, *, row: int | None = None, kind: Kind = "server", fix: str | None = None
    ) -> TrainingError:
        message = f"{KEY}: {self._url} {without_key(what, self._key)}"
        return TrainingError(message, kind=kind, key=KEY, row=row, fix=fix)


def was_cut(sequences: Sequences, eos_token_ids: Tensor) -> list[bool]:
    """Which responses were cut at the length limit; of rows that do not know, those without an end token."""
    if sequences.cut_B is not None:
        return sequences.cut_B.tolist()
    last_B = sequences.ids_BT[torch.arange(len(sequences)), sequences.lengths_B - 1]
    return (~torch.isin(last_B, eos_token_ids)).tolist()


def check_columns(wanted: Collection[str], there: Collection[str]) -> None:
    """Raise `InputError` for a column that is to be sent and that the prompts do not have."""
    if missing := [name for name in wanted if name not in there]:
        raise InputError(
            f"ppo.reward.server.columns: the prompts have no column {missing[0]!r}",
            kind="missing",
            key="ppo.reward.server.columns",
        )


def _api_key(settings: ScoreServer) -> str:
    """The key that is sent, "" for none."""
    if settings.api_key_env is None:
        return ""
    key = key_in(settings.api_key_env, "ppo.reward.server.api_key_env")
    if not key:
        raise InputError(
            f"the environment variable {settings.api_key_env} holds no key",
            kind="missing",
            key="ppo.reward.server.api_key_env",
            fix="set it, or leave out api_key_env",
        )
    return key
