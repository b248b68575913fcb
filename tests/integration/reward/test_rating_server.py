"""Ratings by a chat model behind a real server on loopback as PPO's reward: what is asked, read, kept and refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.config.reward_source import RewardSource
from pe_rlhf.runs.layout import StageFiles
from pe_rlhf.scoring.judge_scorer import JudgeScorer
from pe_rlhf.types import Sequences
from reward.errors import JudgeError
from tests.failures import raises
from tests.integration.reward.test_servers import Body, Rule, Server, said, serving
from tests.runs import read_jsonl
from tests.stage_support import byte_model, run, write_prompts

PROMPTS: list[Any] = ["p", "q", "p"]
RESPONSES = ["good", "good good", "good"]
ROWS = Sequences.pack([[10], [11], [10]], [[1], [2], [1]], 0)


def goods(body: Body) -> int:
    """How often the response says "good"; the server rates it 2 more than that."""
    found = re.search(r"\[Response\]\n(.*?)\n\[End of response\]", body["messages"][0]["content"], re.DOTALL)
    assert found is not None, body
    return found[1].count("good")


def by_probabilities(body: Body, number: int) -> tuple[int, Any, dict[str, str]]:
    """0.6 for the rating and 0.2 for the next one; the rest is not a rating."""
    rating = goods(body) + 2
    top = [(str(rating), 0.6), (f" {rating + 1}", 0.2), ("I", 0.2)]
    return 200, said(str(rating), "length", [{"token": t, "logprob": math.log(p)} for t, p in top]), {}


def saying(*texts: str) -> Rule:
    """These answers in turn, the last one for ever, with no log-probs."""
    return lambda body, number: (200, said(texts[min(number, len(texts) - 1)]), {})


def scorer(server: Server, folder: Path, **settings: Any) -> JudgeScorer:
    judge = {"kind": "llm", "target": "m", "base_url": server.url, "answer_attempts": 2, "attempts": 2, **settings}
    source = RewardSource.model_validate({"judge": judge, "against": "score"})
    return JudgeScorer(source, StageFiles(folder), None)


def score(judge: JudgeScorer) -> list[float]:
    return judge.score(PROMPTS, RESPONSES, ROWS).tolist()


def test_the_expectation_over_the_ratings_each_text_once(tmp_path: Path) -> None:
    with serving(by_probabilities) as server:
        judge = scorer(server, tmp_path)
        expected = [(3 * 0.6 + 4 * 0.2) / 0.8, (4 * 0.6 + 5 * 0.2) / 0.8, (3 * 0.6 + 4 * 0.2) / 0.8]
        assert score(judge) == pytest.approx(expected)
        assert len(server.bodies) == 2
        assert all(body["logprobs"] and body["max_tokens"] == 1 for body in server.bodies)
        assert score(scorer(server, tmp_path)) == pytest.approx(expected)  # a run that goes on
        assert len(server.bodies) == 2
    rows = read_jsonl(StageFiles(tmp_path).judged_rewards)
    assert [row["requests"] for row in rows] == [1, 1]


def test_the_rating_in_the_text_where_there_are_no_log_probs(tmp_path: Path) -> None:
    with serving(saying("1", "Rating: 7/10", "good question", "[[9]]")) as server:
        assert score(scorer(server, tmp_path, concurrency=1)) == [7, 9, 7]
        # What it says where it is asked for one token, 1, may go on as 10.
        assert [body["max_tokens"] for body in server.bodies] == [1, 4096, 4096, 4096]


@pytest.mark.parametrize("text", ["", "It is good.", "Rating: 7\nRating: 8", "7-8", "11", "0", "-5", "4/5"])
def test_what_is_no_rating_stops_the_step_and_scores_nothing(tmp_path: Path, text: str) -> None:
    with serving(saying(text)) as server:
        with raises("judge", JudgeError, key="max_invalid_share"):
            score(scorer(server, tmp_path, concurrency=1))
        assert not StageFiles(tmp_path).judged_rewards.exists()
        # Once it answers in a way that can be read, the same step goes on.
        server.rule = by_probabilities
        assert score(scorer(server, tmp_path)) == pytest.approx([3.25, 4.25, 3.25])


def test_a_server_that_fails_and_a_budget_that_is_spent(tmp_path: Path) -> None:
    with serving(lambda body, number: (500, {"error": {"message": "down"}}, {})) as server:
        with raises("server", JudgeError):
            score(scorer(server, tmp_path))
        with raises("budget", JudgeError, key="ppo.reward.judge.max_requests"):
            score(scorer(server, tmp_path / "other", max_requests=1))


def test_a_template_of_ones_own_and_one_that_there_is_not(tmp_path: Path) -> None:
    own = tmp_path / "mine.jinja2"
    own.write_text("{{ messages[0].content }} [Response]\n{{ response }}\n[End of response] End with [[rating]].")
    with serving(by_probabilities) as server:
        assert score(scorer(server, tmp_path / "run", template=str(own))) == pytest.approx([3.25, 4.25, 3.25])
        assert "End with [[rating]]" in server.bodies[0]["messages"][0]["content"]
        with raises("unknown", key="judge.template"):
            scorer(server, tmp_path / "run", template="mt_bench")
        own.write_text("{{ response_a }}")
        with raises("user_code", key="judge.template"):
            scorer(server, tmp_path / "run", template=str(own))


def test_ppo_by_ratings(tmp_path: Path) -> None:
    """Two steps by a judge that rates by a rule; the scores that are logged are the rule's."""

    def rule(body: Body, number: int) -> tuple[int, Any, dict[str, str]]:
        top = [{"token": "3", "logprob": math.log(0.5)}, {"token": "7", "logprob": math.log(0.5)}]
        return 200, said("3", "length", top), {}

    with serving(rule) as server:
        judge = {"kind": "llm", "target": "m", "base_url": server.url, "template": "helpfulness"}
        tree = {
            "model": str(byte_model(tmp_path / "model", pad_is_eos=True)),
            "adapter": {"rank": 2, "alpha": 4},
            "threads": 1,
            "ppo": {
                "prompts": write_prompts(tmp_path / "p.jsonl", ["a", "b", "c"]),
                "reward": [{"judge": judge, "against": "score"}],
                "rollout": {"max_new_tokens": 4},
                "steps": 2,
                "batch_size": 3,
            },
        }
        run(tree, tmp_path / "run")
        asked = len(server.bodies)
    lines = read_jsonl(tmp_path / "run" / "ppo" / "metrics.jsonl")
    assert all(line["reward"] == pytest.approx(5) for line in lines)
    assert asked == len(read_jsonl(tmp_path / "run" / "ppo" / "judged_rewards.jsonl"))
    assert all("[Response B]" not in json.dumps(body) for body in server.bodies)
