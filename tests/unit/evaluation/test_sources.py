"""Who answers the prompts of an evaluation, beside what the command line is tested with."""

from __future__ import annotations

import pytest

from pe_rlhf.config.evaluate import EvaluationSettings
from pe_rlhf.evaluation.sources import ServerSource
from tests.chat_server import KEY, ChatServer, running

PROMPT = "{}\n[Response A]\ngood\n[End of response A]\n[Response B]\nbad\n[End of response B]"  # one that it can read


def test_an_endpoint_is_not_asked_far_ahead_of_an_answer_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are written in their order, so those that are there before their turn are lost with the process."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    prompts = [PROMPT.format(i) for i in range(30)]
    with running(ChatServer(faults=lambda number: "hang" if number == 0 else None)) as server:
        settings = {"judge": "length", "sampling": {"max_new_tokens": 4}, "server": {"concurrency": 2}}
        source = ServerSource(f"{server.url}#m", EvaluationSettings.model_validate(settings))
        answers = source.responses(prompts, 0)
        assert next(answers) == "A"
        assert server.requests <= 5
        assert list(answers) == ["A"] * 29
        assert server.requests == 30
