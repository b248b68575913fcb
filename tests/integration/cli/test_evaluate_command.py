"""`pe-rlhf evaluate`: sources of responses, resume after a kill."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pe_rlhf.cli.main import app
from pe_rlhf.config import SamplingConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.evaluation.responses import Side, responses_of
from pe_rlhf.evaluation.sources import find_policy, load_merged
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.system.files import locked
from pe_rlhf.system.seeding import derive_seed
from reward.errors import Failure, InputError
from reward.records import Prompt
from tests.chat_server import KEY, ChatServer, running
from tests.forked import Forked
from tests.runs import PROMPTS, Outcome, contents, read_jsonl, recipe, write_jsonl, write_recipe
from tests.tiny import tiny_model

PROMPT_TEXTS = [f"Prompt {i}" for i in range(12)]


def refusal(cli: Callable[..., Outcome], *arguments: Any) -> InputError:
    """The error that a command ends with, which the command line tells in a sentence."""
    outcome = cli(*arguments)
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err
    with pytest.raises(InputError) as caught:
        app(list(map(str, arguments)), standalone_mode=False)
    return caught.value


def write_outputs(folder: Path) -> tuple[Path, Path]:
    """Finished outputs in AlpacaEval's form and in ours; "good" 0, 1 or 2 times against once."""
    mine = [{"instruction": text, "output": "good " * (i % 3) + "<b>x</b>"} for i, text in enumerate(PROMPT_TEXTS)]
    (folder / "mine.json").write_text(json.dumps(mine))
    other = write_jsonl(folder / "other.jsonl", [{"prompt": t, "response": "good y"} for t in reversed(PROMPT_TEXTS)])
    return folder / "mine.json", other


def test_files_of_outputs_are_matched_by_prompt(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    mine, other = write_outputs(tmp_path)
    outcome = cli("evaluate", mine, "--against", other, "--judge", "length", "--out", "e")
    assert outcome.code == 0, outcome
    line = json.loads(outcome.out)
    # By hand: 8, 13 and 18 characters against 6.
    assert (line["win_rate"], line["n"], line["mean_len_baseline"]) == (1.0, 12, 6.0)
    assert line == json.loads((tmp_path / "e" / "summary.json").read_text())
    rows = read_jsonl(tmp_path / "e" / "verdicts.jsonl")
    assert [row["prompt"] for row in rows] == PROMPT_TEXTS
    again = json.loads(cli("winrate", "e/verdicts.jsonl").out)
    assert {key: again[key] for key in ("win_rate", "ci_low", "n")} == {k: line[k] for k in ("win_rate", "ci_low", "n")}


def test_a_run_against_its_base_and_a_model_against_an_endpoint(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo"))
    assert cli("run", path, "--run-dir", "run").code == 0
    arguments = ["--prompts", "prompts.jsonl", "--judge", "length", "sampling.max_new_tokens=6", "--out", "e"]
    outcome = cli("evaluate", "run", *arguments)
    assert outcome.code == 0, outcome
    line = json.loads(outcome.out)
    assert (line["baseline"], line["n"]) == ("random:tiny-llama", len(PROMPTS))
    before = (tmp_path / "e" / "candidate.jsonl").read_bytes()
    # Half of a response was written when it was killed: the same command makes the same file.
    (tmp_path / "e" / "candidate.jsonl").write_bytes(before[: len(before) // 2])
    assert json.loads(cli("evaluate", "run", *arguments).out) == line
    assert (tmp_path / "e" / "candidate.jsonl").read_bytes() == before
    assert refusal(cli, "evaluate", "run", *arguments, "seed=5").kind == "changed"
    peft = cli("evaluate", "run/ppo/adapter", *arguments[:-1], "e2")
    assert json.loads(peft.out)["win_rate"] == line["win_rate"]
    # Trained anew in the same place: its responses are not the ones that lie there.
    assert cli("run", path, "--run-dir", "run", "--from", "ppo", "ppo.learning_rate=0.05").code == 0
    assert refusal(cli, "evaluate", "run", *arguments).kind == "changed"
    assert (tmp_path / "e" / "candidate.jsonl").read_bytes() == before


def test_a_run_is_loaded_and_its_anchor_prompted_as_its_recipe_says(
    cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    path = write_recipe(tmp_path, {**recipe("ppo"), "chat_template": template, "backbone": {"dtype": "bfloat16"}})
    assert cli("run", path, "--run-dir", "run").code == 0
    arguments = ["--prompts", "prompts.jsonl", "--judge", "length", "sampling.max_new_tokens=6"]
    outcome = cli("evaluate", "run", *arguments, "--out", "e")
    assert outcome.code == 0, outcome
    # What the baseline has said is what the model says that is asked in that way, in that dtype.
    plain = load_backbone("random:tiny-llama", dtype="bfloat16")
    asked = [plain.tokenizer(f"<{row['prompt']}>", add_special_tokens=False)["input_ids"] for row in PROMPTS]
    sampling = SamplingConfig(max_new_tokens=6, batch_size=32)
    rollout = HFRollout(plain, "anchor", sampling).generate(asked, derive_seed(0, "evaluate", "anchor"))
    said = [row["response"] for row in read_jsonl(tmp_path / "e" / "baseline.jsonl")[1:]]
    assert said == [TextCodec(plain.tokenizer).decode(ids) for ids in rollout.responses]
    found = find_policy("run")
    assert found is not None
    backbone, codec = found.load_base(dtype="float32", device="cpu")
    assert backbone.model.dtype == torch.bfloat16
    assert codec.decode(codec.encode_prompt("abc")) == "<abc>"
    # Without its recipe nothing tells of the dtype.
    for file in (tmp_path / "run" / "recipe.yaml", tmp_path / "run" / "ppo" / "recipe.yaml"):
        file.unlink(missing_ok=True)
    outcome = cli("evaluate", "run/ppo", *arguments, "--out", "e2")
    assert outcome.errors[0].endswith("than random:tiny-llama in float32")
    assert cli("evaluate", "run/ppo", *arguments, "--out", "e3", "dtype=bfloat16").code == 0


def test_a_merged_adapter_ends_with_every_eos_of_its_base(tmp_path: Path) -> None:
    load_backbone("random:tiny-llama").tokenizer.save_pretrained(tmp_path / "base")
    model = tiny_model("llama", vocab_size=257)
    model.generation_config.eos_token_id = [1, 7]  # type: ignore[union-attr]
    model.save_pretrained(tmp_path / "base")
    backbone = load_backbone(str(tmp_path / "base"))
    assert {1, 7} <= set(backbone.eos_token_ids)
    backbone.add_adapter("policy", rank=2)
    backbone.export_adapter("policy", tmp_path / "adapter")
    merged = load_merged(str(tmp_path / "adapter"), str(tmp_path / "base"), dtype="float32", device="cpu")
    assert merged.eos_token_ids == backbone.eos_token_ids


def test_an_endpoint_as_policy_and_judge(
    cli: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    mine, _ = write_outputs(tmp_path)
    with running(ChatServer()) as server:
        arguments = ["--judge", "llm:m", f"judge.base_url={server.url}", "--out", "e"]
        outcome = cli("evaluate", mine, "--against", mine, *arguments)
    assert outcome.code == 0, outcome
    line = json.loads(outcome.out)
    assert (line["win_rate"], line["ties"], line["position_bias"]) == (0.5, 12, pytest.approx(0))
    assert server.requests == 24
    assert all(KEY not in path.read_text() for path in (tmp_path / "e").iterdir())


def test_a_killed_evaluation_goes_on_and_asks_nothing_twice(tmp_path: Path, model_cache: Path) -> None:
    mine, other = write_outputs(tmp_path)

    def slowly(number: int) -> None:
        time.sleep(0.3)

    with running(ChatServer(faults=slowly)) as server:
        command = ["evaluate", str(mine), "--against", str(other), "--judge", "llm:m"]
        command += [f"judge.base_url={server.url}", "judge.concurrency=1", "--out", "e"]
        process = Forked(command, tmp_path, model_cache, {"OPENAI_API_KEY": KEY})
        verdicts = tmp_path / "e" / "verdicts.jsonl"
        process.wait_until(lambda: verdicts.exists() and verdicts.read_bytes().count(b"\n") >= 5)
        assert process.kill() == -signal.SIGKILL
        server.faults = lambda number: None
        said = Forked(command, tmp_path, model_cache, {"OPENAI_API_KEY": KEY}).finish()
    line = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert (line["n"], line["win_rate"]) == (12, pytest.approx(0.5))
    # The one question that was under way when it was killed has been asked again, no other.
    assert sum(server.answered.values()) <= 24 + 1
    assert KEY not in said + verdicts.read_text()


def test_the_page_has_only_the_pairs_of_this_evaluation(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    """The folder keeps verdicts on responses that have changed since, and on prompts beyond the limit.

    A result of other responses or settings stays until somebody removes it.
    """
    mine, other = write_outputs(tmp_path)
    arguments = ["evaluate", mine, "--against", other, "--judge", "length", "--out", "e"]
    assert cli(*arguments).code == 0
    assert cli(*arguments).code == 0
    before, result = mine.read_text(), contents(tmp_path / "e")
    mine.write_text(before.replace("<b>x</b>", "another"))
    judge = tmp_path / "shortest.py"
    judge.write_text("def prefer(prompts, a, b):\n    return [float(len(x) < len(y)) for x, y in zip(a, b)]\n")
    for other_question, key in (
        (arguments, "content"),
        ([*arguments, "level=0.9"], "level"),
        ([*arguments, "--judge", "shortest:prefer"], "judge"),
    ):
        error = refusal(cli, *other_question)
        assert (error.kind, error.key) == ("changed", key)
        assert contents(tmp_path / "e") == result
    (tmp_path / "e" / "summary.json").unlink()
    assert cli(*arguments).code == 0
    mine.write_text(before)
    (tmp_path / "e" / "summary.json").unlink()
    assert cli(*arguments, "--limit", "2").code == 0
    page = (tmp_path / "e" / "report.html").read_text()
    assert "another" not in page
    assert "Prompt 1" in page
    assert "Prompt 2" not in page


def test_a_judge_that_was_edited_is_asked_again(tmp_path: Path, model_cache: Path) -> None:
    mine, other = write_outputs(tmp_path)
    source, rates = "def prefer(prompts, a, b):\n    return [SURE * (len(x) > len(y)) for x, y in zip(a, b)]\n", []
    for sure in ("1.0", "0.5", "1.0"):
        (tmp_path / "my_judge.py").write_text(source.replace("SURE", sure))
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)  # it tells versions apart by seconds
        command = ["evaluate", str(mine), "--against", str(other), "--judge", "my_judge:prefer", "--out", "e"]
        (tmp_path / "e" / "summary.json").unlink(missing_ok=True)
        Forked(command, tmp_path, model_cache).finish()
        rates.append(json.loads((tmp_path / "e" / "summary.json").read_text())["win_rate"])
    assert rates == [1.0, 0.75, 1.0]


def test_a_folder_has_one_evaluation_at_a_time(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    mine, other = write_outputs(tmp_path)
    (tmp_path / "e").mkdir()
    with locked(tmp_path / "e"):
        outcome = cli("evaluate", mine, "--against", other, "--judge", "length", "--out", "e")
    assert outcome.code == 75


def test_responses_that_are_not_their_prompts_are_sampled_again(tmp_path: Path) -> None:
    """As where two processes have written the same file."""

    class Echo:
        def responses(self, prompts: Sequence[Prompt], start: int) -> Iterator[str]:
            yield from (f"to {prompt}" for prompt in prompts[start:])

    source, path = Side("echo", "identity", load=Echo), tmp_path / "candidate.jsonl"
    expected = [f"to {prompt}" for prompt in PROMPT_TEXTS]
    assert responses_of(source, PROMPT_TEXTS, path) == expected
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5] + lines[4:]))  # one of them twice
    assert responses_of(source, PROMPT_TEXTS, path) == expected
    assert path.read_text() == "".join(lines)


def test_half_a_character_in_a_response_is_kept(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    mine, other = write_outputs(tmp_path)
    mine.write_text(json.dumps([{"instruction": text, "output": "cut \ud83d"} for text in PROMPT_TEXTS]))
    outcome = cli("evaluate", mine, "--against", other, "--judge", "length", "--out", "e")
    assert outcome.code == 0, outcome
    assert "cut \\ud83d" in (tmp_path / "e" / "report.html").read_text()


def test_half_a_character_is_no_question_that_cannot_be_asked(
    cli: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    mine, other = write_outputs(tmp_path)
    mine.write_text(json.dumps([{"instruction": text, "output": "cut \ud83d"} for text in PROMPT_TEXTS]))
    with running(ChatServer()) as server:
        arguments = ["--judge", "llm:m", f"judge.base_url={server.url}", "--out", "e"]
        outcome = cli("evaluate", mine, "--against", other, *arguments)
    assert outcome.code == 0, outcome
    assert json.loads(outcome.out)["n"] == 12


def test_a_server_as_policy_keeps_to_the_budget(
    cli: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    _, other = write_outputs(tmp_path)
    with running(ChatServer()) as server:
        arguments = ["--judge", "length", "server.max_requests=3", "--out", "e"]
        outcome = cli("evaluate", f"{server.url}#m", "--against", other, *arguments)
    assert outcome.code == 3
    assert server.requests == 3


def test_a_baseline_at_a_server_that_is_gone_is_known_before_the_candidate_is_sampled(
    cli: Callable[..., Outcome], fails: Callable[..., Failure], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless all of its responses are there already."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in PROMPT_TEXTS[:3]])
    common = ["--judge", "length", "--prompts", prompts, "server.attempts=1", "sampling.max_new_tokens=2", "--out", "e"]
    with running(ChatServer(text="words")) as server:
        arguments = ["evaluate", "random:tiny-llama", "--against", f"{server.url}#m", *common]
        server.list_status = 401
        assert fails(*arguments).key == "api_key_env"
        assert (server.requests, (tmp_path / "e" / "candidate.jsonl").exists()) == (0, False)
        server.list_status = 501
        assert cli(*arguments).code == 0
    assert cli(*arguments).code == 0
    (tmp_path / "e" / "candidate.jsonl").unlink()
    (tmp_path / "e" / "baseline.jsonl").unlink()
    error = fails(*arguments, code=3)
    assert (error.kind, error.key) == ("server", "judge.base_url")
    assert not (tmp_path / "e" / "candidate.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "kind", "key"),
    [
        (["--judge", "lenght"], "unknown", "judge"),
        (["--judge", "llm"], "missing", "judge.target"),
        (["--judge", "length:words"], "invalid", "judge.target"),
        (["--judge", "llm:random:tiny-llama", "judge.template=helpfull"], "unknown", "judge.template"),
        (["--judge", "no_such:judge"], "unknown", None),
        (["--judge", "length", "--prompts", "none.jsonl"], None, None),
        (["--judge", "length", "judge.verdict=guess"], "invalid", "judge.verdict"),
        (["--judge", "length", "judge.max_cost=1"], "unknown", "judge.max_cost"),
        (["--judge", "length", "sampling.engine=vllm"], "unknown", "sampling.engine"),
        ([], "missing", "--judge"),
    ],
)
def test_mistakes(
    cli: Callable[..., Outcome], tmp_path: Path, arguments: list[str], kind: str | None, key: str | None
) -> None:
    mine, other = write_outputs(tmp_path)
    error = refusal(cli, "evaluate", mine, "--against", other, *arguments, "--out", "e")
    assert kind in (None, error.kind)
    assert key in (None, error.key)


def test_a_missing_output_and_a_missing_baseline(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    mine, other = write_outputs(tmp_path)
    assert refusal(cli, "evaluate", mine, "--judge", "length").key == "--against"
    write_jsonl(other, [{"prompt": "Prompt 0", "response": "x"}])
    error = refusal(cli, "evaluate", mine, "--against", other, "--judge", "length")
    assert (error.kind, error.file, error.row) == ("missing", str(other), 2)


def test_ppo_with_a_judge_every_other_step(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo", "evaluate", ppo__eval_every=2, ppo__steps=3, ppo__eval_prompts=4))
    assert cli("run", path, "--run-dir", "run", "--to", "ppo").code == 0
    rows = read_jsonl(tmp_path / "run" / "ppo" / "metrics.jsonl")
    assert ["judge_win_rate" in row for row in rows] == [False, True, True]
    assert all(0 <= row["judge_ci_low"] <= row["judge_win_rate"] <= row["judge_ci_high"] <= 1 for row in rows[1:])
    assert rows[-1]["judge_n"] == 4
    verdicts = read_jsonl(tmp_path / "run" / "ppo" / "judge" / "step-000003.jsonl")
    wins: list[Any] = [row["preference"] for row in verdicts]
    assert rows[-1]["judge_win_rate"] == pytest.approx(sum(wins) / 4)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Win-rate by the judge" in page
    assert "Judge&#39;s score and KL" in page


def test_the_last_judgement_during_ppo_is_that_of_the_evaluation(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    """Same policy, prompts and seeds: its KL is of that policy, and not of the one before the last step."""
    path = write_recipe(tmp_path, recipe("ppo", "evaluate", ppo__eval_every=2, ppo__steps=2, ppo__learning_rate=0.01))
    assert cli("run", path, "--run-dir", "run").code == 0
    row = read_jsonl(tmp_path / "run" / "ppo" / "metrics.jsonl")[-1]
    summary = json.loads((tmp_path / "run" / "evaluate" / "summary.json").read_text())
    assert row["judge_kl"] == pytest.approx(summary["kl"], abs=1e-6)
    assert row["judge_kl"] != pytest.approx(row["kl"], abs=1e-3)
    assert row["judge_score_policy"] == pytest.approx(summary["gold_policy"])
    assert row["judge_score_anchor"] == pytest.approx(summary["gold_anchor"])
