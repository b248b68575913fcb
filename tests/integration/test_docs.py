"""Commands of README and docs run where they need no GPU, hub, key or many minutes; so do the examples to extend."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.documentation import OF_A_CHANGED_PACKAGE, Block, Command, apply_changes, blocks, commands, words_of
from tests.integration.rollout.serving import serve
from tests.paths import ROOT
from tests.runs import Outcome, write_jsonl
from tests.stage_support import byte_model
from tests.unit.cli.test_recipes import CHATML
from tests.vllm_routes import Engine, served

Cli = Callable[..., Outcome]

EXTENDING = "extending.md"
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
# What stands for a thing that a command cannot have here, with the reason that it is only parsed (tests/unit).
NEEDS = {
    r"^quickstart$": "ten minutes",
    r"^compare_|^pe_vs_full$": "hours",
    r"^model=path/to/": "a model to name",
    r"llm:|^http": "a model or a server",
    r"^--submit$": "a cluster",
    r"^smoke$": "run once, for all",
    r"^(tldr|hh_helpful)$|^(Anthropic|allenai)/": "the hub",
    r"=vllm$": "vLLM",
    r"^RECIPE|^RUN|^…": "a name to fill in",
    r"^other/": "a second run",
    r"^sft$": "TRL's trainer",
}
# What `pe-rlhf run` and its kin are given to do no more than they must here.
BRIEFLY = {"launch": ["--dry-run"], "compare": ["--dry-run"]}


def reason_not_to_run(command: Command) -> str | None:
    program, *words = command.words
    if program != "pe-rlhf" or (len(words) < 2 and words != ["doctor"]):
        return "not one of ours, or a name"
    if words[0] == "serve-reward":
        return "it serves until it is stopped"
    return next((why for word in words[1:] for pattern, why in NEEDS.items() if re.search(pattern, word)), None)


IN_ORDER = (EXTENDING, "CONTRIBUTING.md", *(page.name for page in TUTORIALS))  # pages with a test of their own
RUN = [c for c in commands() if reason_not_to_run(c) is None and c.page.name not in IN_ORDER]
RUN = list({c.words: c for c in RUN}.values())  # what several pages name runs once


def run(folder: Path, *words: str, root: Path = ROOT) -> None:
    """Run a command in a process of its own, in a folder, with the package of `root`; it has to succeed."""
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "PE_RLHF_CACHE": str(folder / "cache"),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "COLUMNS": "200",
    }
    command = [sys.executable, "-m", "pe_rlhf", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has who has run things in order: recipes and data of their own, and a finished run."""
    folder = tmp_path_factory.mktemp("reader")
    run(folder, "run", "smoke", "threads=1", "name=quickstart", "--run-dir", "runs/quickstart")
    made = folder / "runs" / "quickstart"
    prompts = [{"prompt": f"Say something about {i}", "question": f"What is {i}?"} for i in range(8)]
    for name in ("my_prompts.jsonl", "held_out.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    shutil.copy(made / "preferences" / "preferences.jsonl", folder / "my_pairs.jsonl")
    (folder / "hosts").write_text("node-a slots=8\nnode-b slots=8\n", encoding="utf-8")
    recipe: dict[str, Any] = yaml.safe_load((made / "recipe.yaml").read_text(encoding="utf-8"))
    (folder / "my_recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    comparison = recipe | {"name": "my_comparison", "compare": {"grid": {"init": ["lora", "pissa"]}, "seeds": [1]}}
    (folder / "my_comparison.yaml").write_text(yaml.safe_dump(comparison), encoding="utf-8")
    return folder


@pytest.mark.parametrize("command", RUN, ids=str)
def test_a_command_runs(command: Command, readers_folder: Path, tmp_path: Path, cli: Cli) -> None:
    shutil.copytree(readers_folder, tmp_path, dirs_exist_ok=True)
    name, *words = command.words[1:]
    if name == "run" and not {"--resume", "--dry-run"} & {*words}:  # the finished run is there already
        words += ["--run-dir", "runs/new"]
    ended = cli(name, *words, *BRIEFLY.get(name, ()))
    assert ended.code == 0, ended.err


def test_every_number_that_a_run_writes_is_in_the_glossary_of_metrics(readers_folder: Path) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    known = set(re.findall(r"`([a-z_]+)`", page)) | {"step", "epoch", "reliability", "steps", "prompts"}
    known |= {f"tokens_per_second_{phase}" for phase in ("rollout", "score", "update")}
    written = set()
    for path in (readers_folder / "runs" / "quickstart").glob("*/metrics.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            written |= json.loads(line).keys()
    for path in (readers_folder / "runs" / "quickstart").glob("*/summary.json"):
        written |= json.loads(path.read_text(encoding="utf-8")).keys()
    assert sorted(written - known) == []


def test_the_files_of_a_run_are_described(readers_folder: Path) -> None:
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    folder = readers_folder / "runs" / "quickstart"
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert sorted(name for name in names if name not in page) == []


# ---- docs/extending.md ----------------------------------------------------------------------------------------------


EXTENDS = [c for c in commands() if c.page.name == EXTENDING and c.words[0] == "pe-rlhf"]
OF_A_CHANGE = [c for c in EXTENDS if c.words[-1] in OF_A_CHANGED_PACKAGE]


def examples(folder: Path, *, of_the_package: bool) -> list[Path]:
    """Write the files of the page's examples: those that a user has, or those that go into the package."""
    written = []
    for block in blocks("python", "yaml", "json"):
        inside = block.name.startswith("pe_rlhf/")
        if block.page.name == EXTENDING and block.name and inside == of_the_package:
            path = folder / block.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
            written.append(path)
    return written


@pytest.mark.parametrize(
    "command",
    [c for c in EXTENDS if c not in OF_A_CHANGE],
    ids=str,
)
def test_the_examples_to_extend_run(command: Command, tmp_path: Path, cli: Cli) -> None:
    assert len(examples(tmp_path, of_the_package=False)) >= 6
    ended = cli(*command.words[1:])
    assert (ended.code, bool(ended.out)) == (0, True), ended.err


def test_the_examples_that_change_the_package_run(tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    for name in ("pe_rlhf", "reward", "recipes", "launch"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert len(examples(copy, of_the_package=True)) == 2
    examples(tmp_path, of_the_package=False)
    for block in blocks("diff"):
        apply_changes(block, copy)
    for command in OF_A_CHANGE:
        run(tmp_path, *command.words[1:], root=copy)
    runs = tmp_path / "runs"
    summary = json.loads((runs / "my_lengths" / "lengths" / "summary.json").read_text(encoding="utf-8"))
    assert summary["prompts"] == 4
    recipe = yaml.safe_load((runs / "my_batch_mean" / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["ppo"]["advantage"] == "batch_mean"
    assert not (runs / "my_batch_mean" / "ppo" / "value").exists()


# ---- docs/tutorials -------------------------------------------------------------------------------------------------

# A model and a judge that are here, and no more work than each step must have.
LITTLE = {"steps": 2, "max_new_tokens": 4, "batch_size": 4, "eval_every": 1, "eval_prompts": 2}
LITTLE |= {"seeds": [1], "lr_factors": [0.3, 1]}
SERVED, ELSEWHERE = "http://localhost:8000", "http://gpu9:8000"


def with_stand_ins(text: str, model: Path) -> str:
    """A file of a tutorial, or a command, for a tiny model."""
    text = re.sub(r"judge: \{kind: llm.*\}", "judge: length", text)
    text = re.sub(rf"\b({'|'.join(LITTLE)}): (\d+|\[.*?\])", lambda match: f"{match[1]}: {LITTLE[match[1]]}", text)
    text = re.sub(r"\brun quickstart$", "run smoke name=quickstart threads=1", text)
    return re.sub(r"Qwen/Qwen2\.5-[\w.]+-Instruct", str(model), text)


def write_shown(block: Block, folder: Path, model: Path) -> None:
    """Write a file that a tutorial shows; of data, which the reader has more of, each row six times."""
    path = folder / block.name
    if block.language != "json":
        path.write_text(with_stand_ins(block.text, model), encoding="utf-8")
        return
    rows = [json.loads(line) for line in block.text.splitlines()]
    write_jsonl(path, [row | {"prompt": f"{row['prompt']} {number}"} for row in rows for number in range(6)])


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs(page: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands in order, in one folder, with the files that it shows."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of programs that are started
    model = byte_model(tmp_path / "model", pad_is_eos=False, max_position_embeddings=512, head_dim=32)
    (model / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    own = [block for block in blocks("bash", "python", "yaml", "json", "text") if block.page == page]
    with ExitStack() as servers:
        elsewhere = servers.enter_context(served(Engine(str(model), length=512)))
        for block in sorted(own, key=lambda block: block.line):
            if block.name:
                write_shown(block, tmp_path, model)
            for line in block.text.splitlines() if block.language == "bash" else ():
                ((program, *words),) = words_of(with_stand_ins(line, model).replace(ELSEWHERE, elsewhere))
                if program == "pe-rlhf":
                    starts_ranks = words[0] == "launch" and "--dry-run" not in words
                    ended = cli(*words, *(["--dry-run"] if starts_ranks else []))
                    assert ended.code == 0, (line, ended.err)
                elif program == "python":
                    run_script(tmp_path / words[0])
                elif is_asked(own) and importlib.util.find_spec("vllm") is not None:
                    assert program == "launch/vllm_server.sh"
                    address = servers.enter_context(serve(words[0], tmp_path))
                    (tmp_path / "address").write_text(address, encoding="utf-8")


def is_asked(page: list[Block]) -> bool:
    """Whether a program of the page asks the server that the page starts; else that is on another machine."""
    return any(block.language == "python" and SERVED in block.text for block in page)


def run_script(script: Path) -> None:
    """Run a program that a tutorial shows; one that asks a server only where vLLM is installed to be the server."""
    text, address = script.read_text(encoding="utf-8"), script.with_name("address")
    if SERVED in text:
        if not address.exists():
            return
        script.write_text(text.replace(SERVED, address.read_text(encoding="utf-8")), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=script.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
