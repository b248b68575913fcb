"""A resumed run: which settings may differ, that the record stays what was run, and that a finished stage can go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
import yaml

from pe_rlhf.config import Recipe
from pe_rlhf.config.evaluate import EvaluationSettings
from pe_rlhf.config.load import load_recipe, refuse_other_recipe
from pe_rlhf.evaluation.prompting import prompting_of
from pe_rlhf.evaluation.sources import find_policy
from pe_rlhf.stages.pipeline import run_recipe
from reward.errors import Failure
from tests.runs import Outcome, contents, read_jsonl, recipe, write_recipe

Cli = Callable[..., Outcome]
Fails = Callable[..., Failure]


def said(run: Path) -> dict[str, object]:
    return yaml.safe_load((run / "recipe.yaml").read_text())


def steps(stage: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(stage / "metrics.jsonl")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model_cache: Path) -> Path:
    """A recipe, and in `out` beside it a finished run of it."""
    folder = tmp_path_factory.mktemp("made")
    path = write_recipe(folder, recipe("reward", "ppo", "evaluate", reward__epochs=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PE_RLHF_CACHE", str(model_cache))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "datasets"))
        loaded = load_recipe(path)
        run_recipe(loaded, folder / "out", loaded.stages)
    return path


@pytest.fixture
def finished(made: Path, tmp_path: Path) -> Path:
    """The recipe of a finished run in `out`."""
    shutil.copytree(made.parent / "out", tmp_path / "out")
    return made


def test_what_a_resume_refuses_leaves_everything_as_it_was(finished: Path, fails: Fails) -> None:
    for options, kind, key in [
        (["--may-change", "nonsense.key"], "unknown", "nonsense.key"),
        (["--may-change", "ppo.kl.betta", "ppo.kl.beta=0.2"], "unknown", "ppo.kl.betta"),
        (["--may-change", "ppo.kl.beta=0.2"], "invalid", "ppo.kl.beta"),
        (["--may-change", "ppo.kl.beta", "ppo.steps=4"], "conflict", "ppo.kl.beta"),
        (["--may-change", "ppo.steps", "--may-change", "seed", "ppo.steps=4"], "conflict", "seed"),
        (["--may-change", "ppo.kl.beta", "ppo.kl.beta=0.2"], "changed", "ppo.kl.beta"),
        (["--may-change", "ppo.steps", "ppo.steps=1"], "changed", "ppo.steps"),
        (["--may-change", "ppo", "ppo.steps=4", "ppo.tuning=full"], "unknown", "ppo.tuning"),
        (["--may-change", "ppo", "ppo.steps=4", "ppo.adapter.rank=3"], "changed", "ppo.adapter.kind"),
        (["--may-change", "model", "model=some/other"], "changed", "model"),
        (["--may-change", "tuning", "tuning=full"], "changed", "tuning"),
        (["--may-change", "adapter.rank", "adapter.rank=3"], "changed", "adapter.rank"),
        (["--may-change", "reward.learning_rate", "reward.learning_rate=0.5"], "changed", "reward.learning_rate"),
        (["ppo.steps=4"], "changed", "ppo.steps"),
    ]:
        failure = fails("run", finished, "--run-dir", "out", "--resume", *options)
        assert (failure.kind, failure.key) == (kind, key), options
    for options in (["--may-change", "ppo.steps", "ppo.steps=4"], ["--from", "ppo", "--may-change", "seed", "seed=2"]):
        failure = fails("run", finished, "--run-dir", "new" if options[0] != "--from" else "out", *options)
        assert (failure.kind, failure.key) == ("conflict", "--may-change")
    failure = fails("run", finished, "--run-dir", "out", "--from", "ppo", "reward.learning_rate=0.5")
    assert (failure.kind, failure.key) == ("changed", "reward.learning_rate")


def test_who_samples_and_how_long_one_waits_may_change(finished: Path, cli: Cli) -> None:
    outcome = cli("run", finished, "--run-dir", "out", "--resume", "ppo.rollout.timeout=5", "function_timeout=9")
    assert outcome.code == 0, outcome
    tree = load_recipe(finished).model_dump()
    tree["ppo"]["rollout"] |= {"engine": "vllm", "mode": "server", "urls": ["http://a:8000"]}
    (finished.parent / "served.yaml").write_text(yaml.safe_dump(tree))
    tree["ppo"]["rollout"]["urls"] = ["http://b:8000", "http://c:8000"]
    refuse_other_recipe(Recipe.model_validate(tree), finished.parent / "served.yaml")


@pytest.mark.page
def test_a_finished_stage_whose_steps_were_raised_goes_on(finished: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = contents(out)
    more = ["--resume", "--may-change", "ppo.steps", "ppo.steps=4"]
    outcome = cli("run", finished, "--run-dir", "out", *more)
    assert outcome.code == 0
    assert "ppo: continuing after step 2" in outcome.err
    assert steps(out / "ppo") == [1, 2, 3, 4]
    assert json.loads((out / "ppo/summary.json").read_text())["steps"] == 4
    assert said(out)["ppo"]["steps"] == said(out / "ppo")["ppo"]["steps"] == 4  # type: ignore[index]
    assert read_jsonl(out / "changes.jsonl") == [
        {"key": "ppo.steps", "before": 2, "after": 4, "stage": "ppo", "step": 3}
    ]
    page = (out / "report.html").read_text()
    assert "Changed on the way" in page
    assert "ppo, step 3" in page
    # What came of the shorter training is put aside, and made anew; the reward stage is as it was.
    assert (out / "evaluate.old-1/summary.json").read_bytes() == before["evaluate/summary.json"]
    assert (out / "evaluate/summary.json").is_file()
    assert {n: b for n, b in contents(out).items() if n.startswith("reward/")} == {
        n: b for n, b in before.items() if n.startswith("reward/")
    }
    # The same command once more, as a cluster runs it after a time limit, changes nothing.
    once = contents(out)
    assert cli("run", finished, "--run-dir", "out", *more).code == 0
    assert contents(out) == once


def test_another_estimator_may_take_over_if_the_critic_stays_or_is_not_there(
    cli: Cli, fails: Fails, tmp_path: Path
) -> None:
    samples = "ppo.rollout.samples_per_prompt=2"
    path = write_recipe(tmp_path, recipe("ppo", ppo__advantage="rloo"))
    assert cli("run", path, samples, "--run-dir", "out").code == 0
    failure = fails("run", path, samples, "--run-dir", "out", "--resume", "ppo.advantage=group_mean")
    assert (failure.kind, failure.key) == ("changed", "ppo.advantage")
    more = [samples, "--resume", "--may-change", "ppo.steps", "--may-change", "ppo.advantage", "ppo.steps=3"]
    failure = fails("run", path, "--run-dir", "out", *more, "ppo.advantage=gae")
    assert (failure.kind, failure.key) == ("changed", "ppo.advantage")
    assert cli("run", path, "--run-dir", "out", *more, "ppo.advantage=group_mean").code == 0
    assert steps(tmp_path / "out/ppo") == [1, 2, 3]
    assert ("ppo.advantage", "rloo", "group_mean") in [
        (row["key"], row["before"], row["after"]) for row in read_jsonl(tmp_path / "out/changes.jsonl")
    ]


def test_a_longer_reward_training_makes_the_policy_anew(finished: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = steps(out / "reward")
    assert cli("run", finished, "--run-dir", "out", "--resume", "--may-change", "reward", "reward.epochs=2").code == 0
    assert steps(out / "reward") == list(range(1, 2 * len(first) + 1))
    assert (out / "ppo.old-1").is_dir()
    assert steps(out / "ppo") == [1, 2]


def test_a_stage_without_its_last_checkpoint_cannot_go_on(finished: Path, fails: Fails, tmp_path: Path) -> None:
    for path in (tmp_path / "out/ppo/checkpoints").rglob("state.json"):
        path.write_text("{}")
    failure = fails("run", finished, "--run-dir", "out", "--resume", "--may-change", "ppo.steps", "ppo.steps=4")
    assert (failure.kind, failure.key) == ("missing", "ppo.steps")


def test_a_change_in_the_middle_is_recorded_with_its_step(
    finished: Path, cli: Cli, fails: Fails, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "ppo/summary.json").unlink()  # as after a kill
    failure = fails(
        "run", finished, "--run-dir", "out", "--resume", "--may-change", "ppo.adapter", "ppo.adapter.rank=3"
    )
    assert (failure.kind, failure.key) == ("changed", "ppo.adapter.kind")  # the section, which was not there
    changes = ["--may-change", "ppo.kl.beta", "ppo.kl.beta=0.2", "threads=1"]
    assert cli("run", finished, "--run-dir", "out", "--resume", *changes).code == 0
    rows = read_jsonl(out / "changes.jsonl")
    assert [(row["key"], row["before"], row["after"], row["step"]) for row in rows] == [
        ("threads", None, 1, 3),
        ("ppo.kl.beta", 0.05, 0.2, 3),
    ]
    assert said(out)["ppo"]["kl"]["beta"] == 0.2  # type: ignore[index]


def test_a_run_keeps_the_day_of_its_start(cli: Cli, tmp_path: Path) -> None:
    """A template that prints today's date would prompt a run that goes on tomorrow, or is evaluated then, otherwise."""
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    path = write_recipe(tmp_path, recipe("reward", "ppo", reward__epochs=1, ppo__steps=1, chat_template=template))
    assert cli("run", path, "--run-dir", "out", "--to", "reward").code == 0
    day = str(said(tmp_path / "out")["date"])
    assert abs((date.fromisoformat(day) - date.today()).days) <= 1
    for file in (tmp_path / "out").rglob("recipe.yaml"):  # as if it had been started then
        file.write_text(file.read_text().replace(day, "2020-01-02"))
    outcome = cli("run", path, "--run-dir", "out", "--resume")
    assert outcome.code == 0, outcome
    assert "02 Jan 2020" in outcome.err
    assert said(tmp_path / "out" / "ppo")["date"] == "2020-01-02"
    settings = EvaluationSettings.model_validate({"judge": "length"})
    found = find_policy(str(tmp_path / "out"))
    prompting = prompting_of("candidate", str(tmp_path / "out"), settings, found, None)
    assert prompting.codec is not None
    assert prompting.codec.render("a") == "02 Jan 2020a"
    later = cli("run", path, "--run-dir", "out", "--resume", "date=2021-01-01")
    assert (later.code, getattr(later.error, "key", None)) == (2, "date")


def test_runs_of_earlier_versions_have_no_day(finished: Path, cli: Cli, tmp_path: Path) -> None:
    for file in (tmp_path / "out").rglob("recipe.yaml"):
        tree = yaml.safe_load(file.read_text())
        del tree["date"]
        file.write_text(yaml.safe_dump(tree))
    assert cli("run", finished, "--run-dir", "out", "--resume").code == 0
    assert said(tmp_path / "out").get("date") is None
