"""`pe-rlhf compare` on the tiny random model: real runs, killed, broken, shared out and submitted."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pe_rlhf.comparison.drift import policy_drift
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.runs.saved_roles import load_role
from reward.errors import Failure
from tests.benchmarks.results import commits_of, note_commit, publish
from tests.forked import Forked
from tests.integration.comparison.sweeps import COMPARE, comparison, results, trained, without_machine
from tests.runs import Outcome, contents, read_jsonl, recipe, without_time, write_recipe

Cli = Callable[..., Outcome]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model_cache: Path) -> Path:
    """A comparison that went through: two arms, no trials."""
    folder = tmp_path_factory.mktemp("whole")
    path = comparison(folder)
    note_commit(commits_of(folder / "out"))  # as `make results` does first: the comparison's folder is still its own
    said = Forked(["compare", str(path), "--dir", "out"], folder, model_cache).finish()
    assert f"report: {folder / 'out' / 'report.html'}" in said
    return folder


def test_it_leaves_runs_a_page_and_numbers(whole: Path) -> None:
    out = whole / "out"
    rows = results(out)
    assert [(row["arm"], row["seed"], row["status"]) for row in rows] == [
        (arm, "1", "finished") for arm in ("lora", "pissa")
    ]
    summary = json.loads((out / "summary.json").read_text())
    assert [arm["arm"] for arm in summary["arms"]] == ["lora", "pissa"]
    for arm in summary["arms"]:
        file = out / "runs" / arm["arm"] / "seed-1" / "evaluate" / "summary.json"
        assert arm["win_rate"]["value"] == pytest.approx(json.loads(file.read_text())["win_rate"])
    reward = json.loads((out / "shared" / "reward" / "summary.json").read_text())
    assert all(arm["reward_accuracy"] == pytest.approx(reward["eval_accuracy"]) for arm in summary["arms"])
    assert (out / "win_rates.svg").read_text(encoding="utf-8").startswith("<svg")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "pissa" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    # An arm's run is an ordinary one: its recipe says what was done, and it exports.
    assert "init: pissa" in (out / "runs" / "pissa" / "seed-1" / "recipe.yaml").read_text()


def test_its_numbers_become_a_page_of_the_results(whole: Path, tmp_path: Path) -> None:
    page = publish("inits", whole / "out", tmp_path / "inits").read_text(encoding="utf-8")
    assert f"commit {commits_of(whole / 'out').read_text().strip()}, seeds 1," in page
    for row in results(whole / "out"):
        (line,) = (line for line in page.splitlines() if line.startswith(f"| `{row['arm']}` |"))
        assert f"| {float(row['evaluate_win_rate']):.3f} |" in line
    assert (tmp_path / "inits" / "results.csv").read_bytes() == (whole / "out" / "results.csv").read_bytes()


def test_the_learning_rate_is_that_of_the_better_trial(tmp_path: Path, cli: Cli) -> None:
    compare = {"grid": {"init": ["lora"]}, "tune": {"lr_factors": [0.5, 2.0], "seed": 0}, "seeds": [1]}
    path = write_recipe(tmp_path, recipe("ppo", ppo__learning_rate=0.01) | {"compare": compare})
    done = cli("compare", path, "--dir", "out")
    assert done.code == 0, done.err
    out = tmp_path / "out"
    values = {}
    for factor in ("0.5", "2"):
        lines = read_jsonl(out / "trials" / "lora" / f"lr-x{factor}" / "ppo" / "metrics.jsonl")
        assert [line["step"] for line in lines] == [1, 2]
        values[float(factor)] = 0.95 * lines[-1]["reward"] - 0.05 * lines[-1]["kl"]  # β is 0.05, convex
    best = max(values, key=lambda factor: values[factor])
    assert len(set(values.values())) == 2
    trials = json.loads((out / "summary.json").read_text())["trials"]
    assert {t["lr_factor"]: t["objective"] for t in trials} == pytest.approx(values)
    assert [t["lr_factor"] for t in trials if t["chosen"]] == [best]
    line = read_jsonl(out / "runs" / "lora" / "seed-1" / "ppo" / "metrics.jsonl")[0]
    assert line["lr_policy"] == pytest.approx(best * 0.01)
    assert [row["ppo.learning_rate"] for row in results(out)] == [f"{best * 0.01:g}"]


def test_again_it_runs_nothing(whole: Path, cli: Cli) -> None:
    before = {k: v for k, v in contents(whole / "out").items() if "/" in k}
    done = cli("compare", whole / "recipe.yaml", "--dir", whole / "out")
    assert done.code == 0, done.err
    assert "running" not in done.err
    assert {k: v for k, v in contents(whole / "out").items() if "/" in k} == before


def test_another_recipe_in_the_same_directory_is_refused(whole: Path, fails: Callable[..., Failure], cli: Cli) -> None:
    before = contents(whole / "out")
    for change in ("ppo.gamma=0.9", "compare.share=nothing", "compare.seeds=[2]", "compare.grid={init: [lora, rlpo]}"):
        for more in ((), ("--dry-run",)):
            failure = fails("compare", whole / "recipe.yaml", "--dir", whole / "out", change, *more)
            assert (failure.kind, failure.key) == ("changed", "--dir")
    assert contents(whole / "out") == before
    more = cli("compare", whole / "recipe.yaml", "--dir", whole / "out", "compare.seeds=[1, 2]", "--dry-run")
    assert more.code == 0, more.err


@pytest.mark.slow
def test_killed_at_random_it_comes_to_the_same(whole: Path, tmp_path: Path, model_cache: Path, cli: Cli) -> None:
    """SIGKILL at random moments, three times: no run is left behind, the results are those of one that went through."""
    for name in ("recipe.yaml", "prompts.jsonl", "pairs.jsonl"):
        shutil.copy(whole / name, tmp_path / name)
    chance = random.Random(7)
    for at in ("shared/log.txt", "runs/lora/seed-1/log.txt", "runs/pissa/seed-1/ppo/metrics.jsonl"):
        process = Forked(["compare", "recipe.yaml", "--dir", "out"], tmp_path, model_cache)
        process.wait_until((tmp_path / "out" / at).exists)
        time.sleep(chance.uniform(0, 1))
        children = psutil.Process(process.pid).children(recursive=True)
        assert process.kill() == -signal.SIGKILL
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive
    done = cli("compare", "recipe.yaml", "--dir", "out")
    assert done.code == 0, done.err
    assert [without_machine(row) for row in results(tmp_path / "out")] == [
        without_machine(row) for row in results(whole / "out")
    ]
    assert trained(tmp_path / "out") == trained(whole / "out")
    for path in (whole / "out" / "runs").rglob("metrics.jsonl"):
        other = tmp_path / "out" / path.relative_to(whole / "out")
        assert list(map(without_time, read_jsonl(other))) == list(map(without_time, read_jsonl(path)))


def test_runs_wait_for_what_is_shared(tmp_path: Path, cli: Cli) -> None:
    done = cli("compare", comparison(tmp_path), "--dir", "out", "--only", "runs:1/2")
    assert done.code == 2
    assert isinstance(done.error, Failure)
    assert done.error.kind == "unfinished"


def test_a_broken_arm_loses_no_other_and_can_be_tried_again(tmp_path: Path, cli: Cli) -> None:
    """An arm whose reward function raises until a file is there."""
    (tmp_path / "moody.py").write_text(
        "from pathlib import Path\n"
        "def score(prompts, responses):\n"
        "    if not Path('well').exists():\n"
        "        raise ValueError('not today')\n"
        "    return [float(len(r)) for r in responses]\n"
    )
    arms = [{"name": "moody", "ppo.reward": [{"function": "moody:score"}]}, {"name": "fine", "rank": 1}]
    path = write_recipe(tmp_path, recipe("ppo") | {"compare": {"arms": arms, "seeds": [1]}})
    done = cli("compare", path, "--dir", "out")
    assert done.code == 3
    assert done.err.strip().splitlines()[-1].startswith("error: compare: 1 runs failed: moody, seed 1")
    failure = json.loads((tmp_path / "out" / "runs" / "moody" / "seed-1" / "failure.json").read_text())
    assert failure["exit_code"] == 2
    rows = {row["arm"]: row for row in results(tmp_path / "out")}
    assert rows["fine"]["status"] == "finished"
    assert rows["moody"]["status"] == "failed"
    assert "not today" in rows["moody"]["message"]
    assert rows["moody"]["failure"] == failure["kind"]
    assert "not today" in (tmp_path / "out" / "report.html").read_text()

    again = cli("compare", path, "--dir", "out")
    assert again.code == 3
    assert "failed before, left as it is: moody, seed 1" in again.err
    assert "running" not in again.err

    (tmp_path / "well").touch()
    mended = cli("compare", path, "--dir", "out", "--retry")
    assert mended.code == 0, mended.err
    assert {row["status"] for row in results(tmp_path / "out")} == {"finished"}


def test_shares_of_two_machines_make_one_report(tmp_path: Path, cli: Cli) -> None:
    """Each machine runs its share in a directory of its own; copied into one, they make one report."""
    path = write_recipe(tmp_path, recipe("ppo") | {"compare": COMPARE})
    for machine, share in (("one", "1/2"), ("two", "2/2")):
        done = cli("compare", path, "--dir", machine, "--only", share)
        assert done.code == 0, done.err
    assert [path.name for place in ("one", "two") for path in (tmp_path / place / "runs").iterdir()] == [
        "lora",
        "pissa",
    ]
    shutil.copytree(tmp_path / "two", tmp_path / "one", dirs_exist_ok=True)  # rsync -a two/ one/
    done = cli("compare", path, "--dir", "one", "--only", "report")
    assert done.code == 0, done.err
    assert {row["status"] for row in results(tmp_path / "one")} == {"finished"}
    # Runs of another recipe are no part of it.
    other = cli("compare", path, "--dir", "one", "--only", "report", "ppo.epochs=3")
    assert other.code == 2
    assert "ppo.epochs: 1 → 3" in other.err


@pytest.mark.slow
def test_shares_that_need_the_same_reward_model_both_come_to_their_end(tmp_path: Path, model_cache: Path) -> None:
    """Each with one of an arm's two trials: one trains the reward model, the other waits for it."""
    compare = {"arms": [{"name": "own", "rank": 1}], "share": "nothing", "tune": {"lr_factors": [1, 2]}, "seeds": [1]}
    path = write_recipe(tmp_path, recipe("reward", "ppo", ppo__reward=[{"adapter": "stage"}]) | {"compare": compare})

    def start(share: int) -> Forked:
        command = ["compare", str(path), "--dir", "out", "--only", f"trials:{share}/2"]
        return Forked(command, tmp_path, model_cache)

    trials = tmp_path / "out" / "trials" / "own"
    first = start(1)
    first.wait_until(lambda: any(lock.read_text() for lock in trials.rglob(".lock")))
    (lock,) = trials.rglob(".lock")
    training = psutil.Process(int(lock.read_text()))
    training.suspend()  # until the second has come to it
    second = start(2)
    second.wait_until(lambda: "in use by another process" in second.said)
    training.resume()
    for share in (first, second):
        share.finish()
    assert all((trials / name / "ppo" / "summary.json").is_file() for name in ("lr-x1", "lr-x2"))
    assert not list(trials.rglob("failure.json"))


@pytest.mark.parametrize("moment", ["ppo/metrics.jsonl", "log.txt"], ids=["in training", "while it starts"])
def test_a_signal_stops_the_run_and_the_sweep(tmp_path: Path, model_cache: Path, moment: str) -> None:
    compare = {"grid": {"init": ["lora", "pissa"]}, "seeds": [1]}
    path = write_recipe(tmp_path, recipe("ppo", ppo__steps=400) | {"compare": compare})
    process = Forked(["compare", str(path), "--dir", "out"], tmp_path, model_cache)
    folder = tmp_path / "out" / "runs" / "lora" / "seed-1"
    process.wait_until((folder / moment).exists)
    process.send(signal.SIGTERM)
    said = process.finish(code=143)
    assert said.strip().splitlines()[-1] == "compare: stopped during lora, seed 1; the same command goes on from there"
    assert not (folder / "failure.json").exists()
    if moment == "ppo/metrics.jsonl":  # by then it has what it can save
        assert any((folder / "ppo" / "checkpoints").iterdir())
        assert not psutil.pid_exists(int((folder / ".lock").read_text()))
    assert not (tmp_path / "out" / "runs" / "pissa").exists()


def test_dry_run_lists_and_runs_nothing(tmp_path: Path, cli: Cli) -> None:
    path = comparison(tmp_path, compare__tune={"lr_factors": [1, 3]}, compare__seeds=[4, 5])
    done = cli("compare", path, "--dir", "out", "--dry-run")
    assert done.code == 0, done.err
    assert "2 arms, seeds 4, 5: 4 trials and 4 runs" in done.out
    assert not (tmp_path / "out").exists()
    wrong = cli("compare", path, "--dir", "out", "compare.grid={init: [lora, pisa]}")
    assert wrong.code == 2
    assert "pisa" in wrong.err
    assert not (tmp_path / "out" / "shared").exists()


@pytest.mark.parametrize(
    ("option", "kind"),
    [
        (["--only", "everything"], "unknown"),
        (["--only", "3/2"], "invalid"),
        (["--submit", "pbs"], "unknown"),
        (["--submit", "slurm"], "not_installed"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, fails: Callable[..., Failure], monkeypatch: pytest.MonkeyPatch, option: list[str], kind: str
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    failure = fails("compare", comparison(tmp_path), "--dir", "out", *option)
    assert (failure.kind, failure.key) == (kind, option[0])


def test_run_sends_a_comparison_to_compare(tmp_path: Path, fails: Callable[..., Failure]) -> None:
    failure = fails("run", comparison(tmp_path))
    assert (failure.kind, failure.key) == ("conflict", "compare")
    assert "`pe-rlhf compare " in str(failure)


def test_a_runs_drift_is_that_of_its_adapter(whole: Path) -> None:
    folder = whole / "out" / "runs" / "pissa" / "seed-1" / "ppo"
    backbone = load_backbone("random:tiny-llama")
    load_role(backbone, "policy", folder / "adapter")
    kept = json.loads((folder / "drift.json").read_text())
    found = policy_drift(backbone, 2)
    assert kept.pop("spectrum") == pytest.approx(found.pop("spectrum"), abs=1e-5)
    assert kept == pytest.approx({"rank": 2, **found}, rel=1e-4, abs=1e-7)
