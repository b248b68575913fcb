"""What is data stays data: names leave no folder, no shell reads a word of a recipe, pages and tables run nothing."""

from __future__ import annotations

import csv
import io
import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from pe_rlhf.report.format import slug
from pe_rlhf.report.page import Page, PageSection, Sample, Table, Text, Tile
from pe_rlhf.rollout.vllm.exchange import WeightExchange
from pe_rlhf.runs.export import export_role
from pe_rlhf.runs.layout import RoleFiles
from pe_rlhf.runs.saved_roles import find_role, save_role
from pe_rlhf.system.files import csv_text
from reward.errors import Failure
from reward.judges.base import Comparison
from reward.judges.templates import JudgePrompt
from tests.failures import raises
from tests.runs import recipe, write_recipe
from tests.tiny import backbone_with

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.mark.parametrize("role", ["policy_/../../x", "policy_..", "../x", "policy x", ""])
def test_a_role_names_no_other_place(tmp_path: Path, role: str) -> None:
    save_role(backbone_with("policy"), "policy", tmp_path / "run/ppo/adapter")
    files = RoleFiles(tmp_path / "run/ppo/adapter")
    files.description.write_text(json.dumps(json.loads(files.description.read_text()) | {"role": role}))
    with raises("unreadable", key="role", file=files.description):
        find_role(tmp_path / "run")


def test_an_export_takes_the_place_of_nothing_by_a_path_through_a_folder_that_is_not_there(tmp_path: Path) -> None:
    save_role(backbone_with("policy"), "policy", tmp_path / "run/ppo/adapter")
    with raises("exists"):
        export_role(tmp_path / "run", "lora", tmp_path / "absent/..")
    assert find_role(tmp_path / "run")


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "a/../b", "a\0b", "$(x)", "x;y", "é/ü"])
def test_a_part_of_a_folders_name_is_one_part(name: str) -> None:
    assert "/" not in slug(name)
    assert slug(name) not in ("..", ".")
    assert not set(slug(name)) & set("\0;$()' ")


@pytest.mark.parametrize("word", ["ppo.prompts='x", "--run-dir=$(touch x)", "--run-dir=a;b", "a\nb", "--to=`x`"])
def test_no_word_of_a_command_reaches_a_shell(fails: Callable[..., Failure], tmp_path: Path, word: str) -> None:
    (tmp_path / "hosts").write_text("a slots=1\n")
    path = write_recipe(tmp_path, recipe("ppo"))
    failure = fails("launch", path, word, "--hostfile", "hosts", "--dry-run")
    assert failure.kind == "conflict"


def test_launch_says_that_its_launcher_is_missing(
    fails: Callable[..., Failure], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    failure = fails("launch", write_recipe(tmp_path, recipe("ppo")), "--dry-run")
    assert (failure.kind, failure.key) == ("not_installed", "launch")


def test_every_text_of_a_page_is_escaped() -> None:
    page = Page(
        title=SCRIPT,
        kind="report",
        subtitle=SCRIPT,
        alert=SCRIPT,
        facts={SCRIPT: SCRIPT},
        tiles=[Tile(SCRIPT, SCRIPT, SCRIPT)],
        sections=[
            PageSection(
                SCRIPT,
                note=SCRIPT,
                items=[SCRIPT],
                tables=[Table([SCRIPT, SCRIPT], [[SCRIPT, SCRIPT]], title=SCRIPT, note=SCRIPT)],
                samples=[Sample([SCRIPT], SCRIPT, [Text(SCRIPT, SCRIPT)], kind=SCRIPT, answers=[Text(SCRIPT, SCRIPT)])],
                filters={SCRIPT: 1},
                code=SCRIPT,
            )
        ],
    ).html()
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert page.count("&lt;script&gt;alert") >= 15


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t"])
def test_a_spreadsheet_computes_no_cell(start: str) -> None:
    (row,) = csv.DictReader(
        io.StringIO(csv_text(["arm", "kl", "seed"], [{"arm": f"{start}1+1", "kl": -2.5, "seed": 1}]))
    )
    assert row == {"arm": f"'{start}1+1", "kl": "-2.5", "seed": "1"}


def test_a_judges_template_reaches_nothing_but_its_values(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja2"
    path.write_text("A or B? {{ messages.__class__.__mro__[1].__subclasses__() }}")
    with raises("user_code", key="judge.template"):
        JudgePrompt(str(path)).chat(Comparison("p", "a", "b"), reasoning=False)[-1]["content"]


def test_weights_on_their_way_are_private_unless_a_group_is_named(tmp_path: Path) -> None:
    own = WeightExchange(tmp_path / "own").folder
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o2775)
    shared = WeightExchange(tmp_path / "shared").folder
    assert [stat.S_IMODE(folder.stat().st_mode) & 0o777 for folder in (own, shared)] == [0o700, 0o750]
