"""`pe-rlhf compare` on the tiny random model: real runs, killed, broken, shared out and submitted."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pe_rlhf.comparison.drift import policy_drift
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.runs.saved_roles import load_role
from tests.integration.comparison.sweeps import (
    CHECKOUT,
    COMPARE,
    command,
    comparison,
    environment,
    results,
    run,
    trained,
    without_machine,
)
from tests.runs import contents, read_jsonl, recipe, without_time, write_recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model_cache: Path) -> Path:
    """A comparison that was left alone: two arms, no trials."""
    folder = tmp_path_factory.mktemp("whole")
    path = comparison(folder)
    done = run(folder, model_cache, path, "--dir", "out")
    assert done.returncode == 0, done.stderr
    assert f"report: {folder / 'out' / 'report.html'}" in done.stdout
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


def test_the_learning_rate_is_that_of_the_better_trial(tmp_path: Path, model_cache: Path) -> None:
    compare = {"grid": {"init": ["lora"]}, "tune": {"lr_factors": [0.5, 2.0], "seed": 0}, "seeds": [1]}
    path = write_recipe(tmp_path, recipe("ppo", ppo__learning_rate=0.01) | {"compare": compare})
    done = run(tmp_path, model_cache, path, "--dir", "out")
    assert done.returncode == 0, done.stderr
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


def test_again_it_runs_nothing(whole: Path, model_cache: Path) -> None:
    before = {k: v for k, v in contents(whole / "out").items() if "/" in k}
    done = run(whole, model_cache, whole / "recipe.yaml", "--dir", "out")
    assert done.returncode == 0, done.stderr
    assert "running" not in done.stderr
    assert {k: v for k, v in contents(whole / "out").items() if "/" in k} == before


def test_another_recipe_in_the_same_directory_is_refused(whole: Path, model_cache: Path) -> None:
    done = run(whole, model_cache, whole / "recipe.yaml", "--dir", "out", "ppo.gamma=0.9")
    assert done.returncode == 2
    assert "ppo.gamma: 1.0 → 0.9" in done.stderr


@pytest.mark.slow
def test_killed_at_random_it_comes_to_the_same(whole: Path, tmp_path: Path, model_cache: Path) -> None:
    """SIGKILL at random moments, three times: no run is left behind, the results are those of the run left alone."""
    shutil.copy(whole / "recipe.yaml", tmp_path / "recipe.yaml")
    for name in ("prompts.jsonl", "pairs.jsonl"):
        shutil.copy(whole / name, tmp_path / name)
    chance = random.Random(7)
    for _ in range(3):
        process = subprocess.Popen(
            command("recipe.yaml", "--dir", "out"),
            cwd=tmp_path,
            env=environment(model_cache),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        time.sleep(chance.uniform(8, 25))
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive
    done = run(tmp_path, model_cache, "recipe.yaml", "--dir", "out")
    assert done.returncode == 0, done.stderr
    assert [without_machine(row) for row in results(tmp_path / "out")] == [
        without_machine(row) for row in results(whole / "out")
    ]
    assert trained(tmp_path / "out") == trained(whole / "out")
    for path in (whole / "out" / "runs").rglob("metrics.jsonl"):
        other = tmp_path / "out" / path.relative_to(whole / "out")
        assert list(map(without_time, read_jsonl(other))) == list(map(without_time, read_jsonl(path)))


def test_runs_wait_for_what_is_shared(tmp_path: Path, model_cache: Path) -> None:
    done = run(tmp_path, model_cache, comparison(tmp_path), "--dir", "out", "--only", "runs:1/2")
    assert done.returncode == 2
    assert "run `--only shared` first" in done.stderr


def test_a_broken_arm_loses_no_other_and_can_be_tried_again(tmp_path: Path, model_cache: Path) -> None:
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
    more = {"PYTHONPATH": f"{CHECKOUT}:{tmp_path}"}
    done = run(tmp_path, model_cache, path, "--dir", "out", **more)
    assert done.returncode == 3
    assert done.stderr.strip().splitlines()[-1].startswith("error: compare: 1 runs failed: moody, seed 1")
    failure = json.loads((tmp_path / "out" / "runs" / "moody" / "seed-1" / "failure.json").read_text())
    assert failure["exit_code"] == 2
    rows = {row["arm"]: row for row in results(tmp_path / "out")}
    assert rows["fine"]["status"] == "finished"
    assert rows["moody"]["status"] == "failed"
    assert "not today" in rows["moody"]["message"]
    assert rows["moody"]["failure"] == failure["kind"]
    assert "not today" in (tmp_path / "out" / "report.html").read_text()

    again = run(tmp_path, model_cache, path, "--dir", "out", **more)
    assert again.returncode == 3
    assert "failed before, left as it is: moody, seed 1" in again.stderr
    assert "running" not in again.stderr

    (tmp_path / "well").touch()
    mended = run(tmp_path, model_cache, path, "--dir", "out", "--retry", **more)
    assert mended.returncode == 0, mended.stderr
    assert {row["status"] for row in results(tmp_path / "out")} == {"finished"}


def test_shares_of_two_machines_make_one_report(tmp_path: Path, model_cache: Path) -> None:
    """Each machine runs its share in a directory of its own; copied into one, they make one report."""
    path = write_recipe(tmp_path, recipe("ppo") | {"compare": COMPARE})
    for machine, share in (("one", "1/2"), ("two", "2/2")):
        done = run(tmp_path, model_cache, path, "--dir", machine, "--only", share)
        assert done.returncode == 0, done.stderr
    assert [path.name for place in ("one", "two") for path in (tmp_path / place / "runs").iterdir()] == [
        "lora",
        "pissa",
    ]
    shutil.copytree(tmp_path / "two", tmp_path / "one", dirs_exist_ok=True)  # rsync -a two/ one/
    done = run(tmp_path, model_cache, path, "--dir", "one", "--only", "report")
    assert done.returncode == 0, done.stderr
    assert {row["status"] for row in results(tmp_path / "one")} == {"finished"}
    # Runs of another recipe are no part of it.
    other = run(tmp_path, model_cache, path, "--dir", "one", "--only", "report", "ppo.epochs=3")
    assert other.returncode == 2
    assert "ppo.epochs: 1 → 3" in other.stderr


@pytest.mark.slow
def test_shares_that_need_the_same_reward_model_both_come_to_their_end(tmp_path: Path, model_cache: Path) -> None:
    """Each with one of an arm's two trials: one trains the reward model, the other waits for it."""
    compare = {"arms": [{"name": "own", "rank": 1}], "share": "nothing", "tune": {"lr_factors": [1, 2]}, "seeds": [1]}
    path = write_recipe(tmp_path, recipe("reward", "ppo", ppo__reward=[{"adapter": "stage"}]) | {"compare": compare})

    def start(share: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command(path, "--dir", "out", "--only", f"trials:{share}/2"),
            cwd=tmp_path,
            env=environment(model_cache),
            stderr=subprocess.PIPE,
            text=True,
        )

    trials = tmp_path / "out" / "trials" / "own"
    first = start(1)
    deadline = time.monotonic() + 120
    while not list(trials.rglob(".lock")):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (lock,) = trials.rglob(".lock")
    while not lock.read_text():
        time.sleep(0.05)
    training = psutil.Process(int(lock.read_text()))
    training.suspend()  # until the second has come to it
    second = start(2)
    assert second.stderr is not None
    assert any("in use by another process" in line for line in second.stderr)
    training.resume()
    said = [first.communicate(timeout=240)[1], second.communicate(timeout=240)[1]]
    assert [first.returncode, second.returncode] == [0, 0], said
    assert all((trials / name / "ppo" / "summary.json").is_file() for name in ("lr-x1", "lr-x2"))
    assert not list(trials.rglob("failure.json"))


@pytest.mark.parametrize("moment", ["ppo/metrics.jsonl", "log.txt"], ids=["in training", "while it starts"])
def test_a_signal_stops_the_run_and_the_sweep(tmp_path: Path, model_cache: Path, moment: str) -> None:
    compare = {"grid": {"init": ["lora", "pissa"]}, "seeds": [1]}
    path = write_recipe(tmp_path, recipe("ppo", ppo__steps=400) | {"compare": compare})
    process = subprocess.Popen(
        command(path, "--dir", "out"), cwd=tmp_path, env=environment(model_cache), stderr=subprocess.PIPE, text=True
    )
    folder = tmp_path / "out" / "runs" / "lora" / "seed-1"
    deadline = time.monotonic() + 120
    while not (folder / moment).exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert said.strip().splitlines()[-1] == "compare: stopped during lora, seed 1; the same command goes on from there"
    assert not (folder / "failure.json").exists()
    if moment == "ppo/metrics.jsonl":  # by then it has what it can save
        assert any((folder / "ppo" / "checkpoints").iterdir())
        assert not psutil.pid_exists(int((folder / ".lock").read_text()))
    assert not (tmp_path / "out" / "runs" / "pissa").exists()


def test_dry_run_lists_and_runs_nothing(tmp_path: Path, model_cache: Path) -> None:
    path = comparison(tmp_path, compare__tune={"lr_factors": [1, 3]}, compare__seeds=[4, 5])
    done = run(tmp_path, model_cache, path, "--dir", "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "2 arms, seeds 4, 5: 4 trials and 4 runs" in done.stdout
    assert not (tmp_path / "out").exists()
    wrong = run(tmp_path, model_cache, path, "--dir", "out", "compare.grid={init: [lora, pisa]}")
    assert wrong.returncode == 2
    assert "pisa" in wrong.stderr
    assert not (tmp_path / "out" / "shared").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "everything"], "--only everything"),
        (["--only", "3/2"], "--only 3/2"),
        (["--submit", "pbs"], "--submit pbs"),
        (["--submit", "slurm"], "no sbatch"),
    ],
)
def test_bad_arguments(tmp_path: Path, model_cache: Path, arguments: list[str], said: str) -> None:
    done = run(tmp_path, model_cache, comparison(tmp_path), "--dir", "out", *arguments, PATH="/nonexistent")
    assert done.returncode == 2
    assert said in done.stderr


def test_run_sends_a_comparison_to_compare(tmp_path: Path, model_cache: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pe_rlhf", "run", str(comparison(tmp_path))],
        env=environment(model_cache),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "`pe-rlhf compare " in done.stderr


def test_a_runs_drift_is_that_of_its_adapter(whole: Path) -> None:
    folder = whole / "out" / "runs" / "pissa" / "seed-1" / "ppo"
    backbone = load_backbone("random:tiny-llama")
    load_role(backbone, "policy", folder / "adapter")
    kept = json.loads((folder / "drift.json").read_text())
    found = policy_drift(backbone, 2)
    assert kept.pop("spectrum") == pytest.approx(found.pop("spectrum"), abs=1e-5)
    assert kept == pytest.approx({"rank": 2, **found}, rel=1e-4, abs=1e-7)
