"""Bad inputs over all commands: exit code, kind and key, one sentence, no traceback, nothing changed on the disk."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.model.names import resolve_model
from reward.errors import Failure
from tests.runs import Outcome, contents, recipe, write_recipe

Files = dict[str, str | bytes | None]  # None: a pipe that nobody writes to
USAGE = "usage"  # what the parser of the command line refuses has no kind
DEEP = "[" * 20_000
NOT_UTF8 = b'{"prompt": "\xff\xfe"}\n'
HUGE = "9" * 6000


@dataclass(frozen=True)
class Bad:
    """A command, the files that it is given, and what it says is wrong."""

    arguments: tuple[str, ...]
    kind: str
    key: str | None = None
    files: Files = field(default_factory=dict)
    code: int = 2


def run(*changes: str, kind: str = "invalid", key: str | None = None, **files: str | bytes | None) -> Bad:
    """A dry run of a recipe with overrides; `key` is that of the first override if left out."""
    named = key if key is not None else changes[0].partition("=")[0] if changes else None
    return Bad(("run", "recipe.yaml", *changes, "--dry-run"), kind, named or None, _named(files))


def text(recipe_text: str | bytes, kind: str, key: str | None = None) -> Bad:
    return Bad(("run", "own.yaml", "--dry-run"), kind, key, {"own.yaml": recipe_text})


def with_compare(section: str, kind: str, key: str | None, *options: str) -> Bad:
    base = "model: random:tiny-llama\nppo: {prompts: prompts.jsonl, reward: [{function: 'reward.scores:length'}]}\n"
    return Bad(("compare", "own.yaml", "--dry-run", *options), kind, key, {"own.yaml": f"{base}compare: {section}\n"})


def _named(files: dict[str, Any]) -> Files:
    return {name.replace("__", "."): content for name, content in files.items()}


VALUES = [
    run("seed=-1"),
    run("seed=x"),
    run("seed=1.5"),
    run("threads=0"),
    run("name=../up"),
    run("name=a/b"),
    run("name=''"),
    run("name=.hidden"),
    run("model=[a]"),
    run("model=null"),
    run("tuning=half"),
    run("nonsense=1", kind="unknown"),
    run("ppo.kl.betta=1", kind="unknown"),
    run("adapter.rank=0"),
    run("adapter.rank=-3"),
    run("adapter.rank=two"),
    run("adapter.rank=1000", kind="conflict"),
    run("adapter.alpha=.nan"),
    run("adapter.dropout=1.5"),
    run("adapter.dropout=-0.1"),
    run("adapter.init=pisa", kind="unknown"),
    run("adapter.targets=[]"),
    run("adapter.targets=[q_prj]", kind="unknown"),
    run("adapter.last_layers=0"),
    run("adapter.last_layers=9", kind="conflict"),
    run("backbone.dtype=float99"),
    run("backbone.device=toaster", kind="conflict"),
    run("backbone.device=meta", kind="conflict"),
    run("backbone.quantization=3bit"),
    run("deepspeed=zero9", kind="unknown"),
    run("deepspeed=absent.json", kind="missing"),
    run("deepspeed=list.json", kind="unreadable", list__json="[1]"),
    run("deepspeed=deep.json", kind="unreadable", deep__json=DEEP),
    run("chat_template=absent.jinja", kind="missing"),
    run("chat_template=bytes.jinja", kind="unreadable", bytes__jinja=b"\xff\xfe{{"),
    run("chat_template='{% if %}'", kind="user_code"),
    run("chat_template='{{ 1 / 0 }}'", kind="user_code"),
    run("chat_template='{{ messages.__class__.__mro__ }}'", kind="user_code"),
    run("ppo.steps=0"),
    run("ppo.steps=1e3"),
    run("ppo.batch_size=0"),
    run("ppo.minibatches=0"),
    run("ppo.epochs=-1"),
    run("ppo.learning_rate=-1"),
    run("ppo.learning_rate=.nan"),
    run("ppo.learning_rate=.inf"),
    run("ppo.kl.beta=-0.1"),
    run("ppo.kl.form=other"),
    run("ppo.reward=[]"),
    run("ppo.reward=[{}]", kind="conflict", key="ppo.reward.0"),
    run("ppo.reward=[{model: a, function: 'b:c'}]", kind="conflict", key="ppo.reward.0"),
    run("ppo.reward=[{function: nothing}]", key=""),
    run("ppo.reward=[{function: 'absent_module:f'}]", kind="unknown", key=""),
    run("ppo.reward=[{model: ./absent}]", kind="missing", key="ppo.reward.model"),
    run("ppo.reward=[{adapter: ./absent}]", kind="missing", key="ppo.reward.adapter"),
    run("ppo.rollout.temperature=0"),
    run("ppo.rollout.max_new_tokens=0"),
    run("ppo.rollout.max_new_tokens=512", kind="too_long"),
    run("ppo.prompts=absent.jsonl", kind="missing"),
    run("ppo.prompts=5"),
    run("ppo.prompts=twice.jsonl", kind="unreadable", twice__jsonl='{"prompt": "a", "prompt": "b"}\n'),
    run("ppo.prompts=twice.json", kind="unreadable", twice__json='[{"prompt": "a", "prompt": "b"}]'),
    run("ppo.prompts.path=prompts.jsonl", "ppo.prompts.nonsense=1", kind="unknown", key="ppo.prompts.nonsense"),
    run("evaluate.judge=leng", kind="unknown", key="judge"),
    run("evaluate.judge=llm", kind="missing", key="judge.target"),
    run("evaluate.judge.kind=length", "evaluate.judge.concurrency=-1", key="evaluate.judge.concurrency"),
    run("evaluate.max_invalid_share=2"),
    run("reward.eval_share=2"),
    run("reward.epochs=0"),
    run("reward.data=absent.jsonl", kind="missing"),
    run("tracking.wandb=maybe"),
    run("ppo.steps", key="ppo.steps"),
    run("=3", key="=3"),
    run("ppo..steps=3", key="ppo..steps=3"),
    run("ppo.steps.more=3", kind="unknown"),
    run("ppo.steps=[", kind="unreadable"),
    run("ppo=3"),
]

TEXTS = [
    text("", "empty"),
    text("- a\n- b\n", "invalid"),
    text("42", "invalid"),
    text("model: [", "unreadable"),
    text("model: a: b", "unreadable"),
    text("model: a\nmodel: b\n", "unreadable"),
    text("model: 'a\n", "unreadable"),
    text("\tmodel: a", "unreadable"),
    text(b"model: \xff\xfe", "unreadable"),
    text(b"\x00\x01\x02", "unreadable"),
    text("model: &a [*a]", "invalid", "model"),
    text("*nowhere", "unreadable"),
    text("!!python/object/apply:os.system ['true']", "unreadable"),
    text("a: " * 3 + DEEP, "unreadable"),
    text("model: random:tiny-llama\nseed: " + HUGE, "unreadable"),
    text("model: random:tiny-llama\npppo: {}\n", "unknown", "pppo"),
    text("1: 2\nmodel: random:tiny-llama\n", "invalid", "1"),
    text("ppo: {}\n", "missing", "model"),
    text("model: random:tiny-llama\nppo: null\n", "missing"),
    text("model: random:tiny-llama\nppo: {prompts: prompts.jsonl}\n", "missing", "ppo.reward"),
]

OPTIONS = [
    Bad(("run",), USAGE),
    Bad(("run", "absent.yaml"), "missing", "RECIPE"),
    Bad(("run", "smok"), "missing", "RECIPE"),
    Bad(("run", "."), "invalid", "RECIPE"),
    Bad(("run", "recipe.yaml", "--nonsense"), USAGE),
    Bad(("run", "recipe.yaml", "--from", "nowhere"), "unknown", "nowhere"),
    Bad(("run", "recipe.yaml", "--to", "sft"), "unknown", "sft"),
    Bad(("run", "recipe.yaml", "--from", "ppo", "--to", "reward"), "conflict", "from"),
    Bad(("run", "recipe.yaml", "--may-change", "seed"), "conflict", "--may-change"),
    Bad(
        ("run", "recipe.yaml", "--run-dir", "made", "--resume"),
        "unreadable",
        None,
        {"made/recipe.yaml": "model: [", "made/ppo/x": ""},
    ),
    Bad(
        ("run", "recipe.yaml", "--run-dir", "made", "--resume"),
        "invalid",
        None,
        {"made/recipe.yaml": "5", "made/ppo/x": ""},
    ),
    Bad(("run", "recipe.yaml", "--run-dir", "file"), "exists", "--run-dir", {"file": "mine"}),
    # Below a file no folder can be made, also not by the run that a dry run promises.
    Bad(("run", "recipe.yaml", "--run-dir", "file/run"), "exists", "--run-dir", {"file": "mine"}),
    Bad(("run", "recipe.yaml", "--run-dir", "file/a/run", "--dry-run"), "exists", "--run-dir", {"file": "mine"}),
    Bad(("nonsense",), USAGE),
    Bad(("doctor", "nonsense"), USAGE),
]

OUTPUTS = '{"prompt": "a", "response": "b"}\n'


def evaluate(*options: str, kind: str, key: str | None = None, **files: str | bytes | None) -> Bad:
    judged = () if "--judge" in options else ("--judge", "length")
    return Bad(("evaluate", *options, *judged), kind, key, {"out.jsonl": OUTPUTS} | _named(files))


AGAINST = ("out.jsonl", "--against", "out.jsonl")
EVALUATE = [
    Bad(("evaluate", "out.jsonl", "--against", "out.jsonl"), "missing", "--judge", {"out.jsonl": OUTPUTS}),
    evaluate("out.jsonl", kind="missing", key="--against"),
    evaluate("absent.jsonl", "--against", "out.jsonl", kind="missing", key="model"),
    evaluate("runs/absent", kind="missing", key="CANDIDATE"),
    evaluate("absent.jsonl", kind="missing", key="CANDIDATE"),
    evaluate(*AGAINST, "--judge", "leng", kind="unknown", key="judge"),
    evaluate(*AGAINST, "--judge", "", kind="unknown", key="judge"),
    evaluate(*AGAINST, "--judge", "absent_module:f", kind="unknown"),
    evaluate(*AGAINST, "--judge", "length:3", kind="invalid", key="judge.target"),
    evaluate(*AGAINST, "judge.concurrency=0", kind="invalid", key="judge.concurrency"),
    evaluate(*AGAINST, "judge.nonsense=1", kind="unknown", key="judge.nonsense"),
    evaluate(*AGAINST, "judge.template=absent", "--judge", "llm:x", kind="unknown", key="judge.template"),
    evaluate(*AGAINST, "sampling.max_new_tokens=0", kind="invalid", key="sampling.max_new_tokens"),
    evaluate(*AGAINST, "sampling.temperature=-1", kind="invalid", key="sampling.temperature"),
    evaluate(*AGAINST, "level=2", kind="invalid", key="level"),
    evaluate(*AGAINST, "seed=-1", kind="invalid", key="seed"),
    evaluate(*AGAINST, "dtype=float99", kind="invalid", key="dtype"),
    evaluate(*AGAINST, "--limit", "0", kind=USAGE),
    evaluate(*AGAINST, "--prompts", "absent.jsonl", kind="missing", key="--prompts"),
    evaluate(*AGAINST, "--out", "made", kind="exists", key="--out", made="mine"),
    evaluate(*AGAINST, "--out", "made/out", kind="exists", key="--out", made="mine"),
    evaluate("empty.jsonl", "--against", "out.jsonl", kind="empty", empty__jsonl=""),
    evaluate("list.jsonl", "--against", "out.jsonl", kind="unreadable", list__jsonl="[1, 2]\n"),
    evaluate("number.jsonl", "--against", "out.jsonl", kind="unreadable", number__jsonl="5\n"),
    evaluate("cut.jsonl", "--against", "out.jsonl", kind="unreadable", cut__jsonl='{"prompt": "a"'),
    evaluate("deep.jsonl", "--against", "out.jsonl", kind="unreadable", deep__jsonl=DEEP),
    evaluate("bytes.jsonl", "--against", "out.jsonl", kind="unreadable", bytes__jsonl=NOT_UTF8),
    evaluate("other.jsonl", "--against", "out.jsonl", kind="missing", key="response", other__jsonl='{"a": 1}\n'),
    evaluate(*AGAINST, "--judge", "exits:f", kind="user_code", exits__py="import sys\nsys.exit(0)\n"),
    evaluate(*AGAINST, "--judge", "exits:f", kind="user_code", exits__py="def f(p, r):\n    raise SystemExit\n"),
    evaluate(*AGAINST, "--judge", "one:f", kind="user_code", one__py="def f(p): return [0.0]\n"),
]

LINE = '{"preference": 1.0}\n'


def winrate(content: str | bytes, kind: str, key: str | None = None, *options: str, name: str = "v.jsonl") -> Bad:
    return Bad(("winrate", name, *options), kind, key, {name: content})


WINRATE = [
    Bad(("winrate", "absent.jsonl"), "missing"),
    winrate("", "empty"),
    winrate("[1]\n", "unreadable"),
    winrate("5\n", "unreadable"),
    winrate('{"a": 1}\n', "missing", "preference"),
    winrate('{"preference": 2.5}\n', "invalid", "preference"),
    winrate('{"preference": "x"}\n', "invalid", "preference"),
    winrate('{"preference": [1]}\n', "invalid", "preference"),
    winrate('{"preference": 1e999}\n', "invalid", "preference"),
    winrate(f'{{"preference": {HUGE}}}\n', "unreadable"),
    winrate('{"preference": null}\n', "empty", "preference"),
    winrate('{"preference": 1, "preference": 0}\n', "unreadable"),
    winrate(DEEP, "unreadable"),
    winrate(NOT_UTF8, "unreadable"),
    winrate(b"\x1f\x8bnot gzip", "unreadable", None, name="v.jsonl.gz"),
    winrate("{}", "unreadable", name="v.json"),
    winrate("preference\nx\n", "invalid", "preference", name="v.csv"),
    winrate(LINE, "invalid", "level", "--level", "0"),
    winrate(LINE, "invalid", "level", "--level", "1.5"),
    winrate(LINE, "invalid", "level", "--level", "nan"),
    winrate(LINE, USAGE, None, "--level", "x"),
    winrate(LINE, "missing", None, "--difficulty", "absent.csv"),
    winrate('{"preference": 1, "order": "first"}\n', "invalid", "order"),
    winrate('{"preference": 1, "position": "x"}\n', "invalid", "position"),
]

ROLE = "made/role.json"
ENDINGS = (".jsonl", ".json", ".csv", ".txt", ".jsonl.gz", ".json.zst")
NODES = ("--num-nodes", "2", "--node-rank", "0")
OTHERS = [
    Bad(("export", "absent"), "missing"),
    Bad(("export", "made"), "missing", None, {"made/x": ""}),
    Bad(("export", "made", "--role", "polcy"), "unknown", "role", {"made/x": ""}),
    Bad(("export", "made", "--format", "onnx"), USAGE, None, {"made/x": ""}),
    Bad(("export", "made", "--checkpoint", "best"), "missing", "checkpoint", {"made/x": ""}),
    *(Bad(("export", "made"), "unreadable", None, {ROLE: said}) for said in ("[1]", "5", "", DEEP, "null", '"x"')),
    Bad(("export", "made"), "unreadable", "role", {ROLE: "{}"}),
    Bad(("export", "made"), "unreadable", None, {ROLE: b"\xff\xfe"}),
    Bad(("inspect", "absent.yaml"), "missing", "RECIPE"),
    Bad(("inspect", "recipe.yaml", "--inits", "pisa"), "unknown", "adapter.init"),
    Bad(("inspect", "recipe.yaml", "--stage", "evaluate"), "unknown", "stage"),
    Bad(("inspect", "recipe.yaml", "--to", "recipe.yaml"), "invalid", "--to"),
    Bad(("inspect", "recipe.yaml", "--to", "page.html"), "exists", "--to", {"page.html": "<p>mine"}),
    Bad(("inspect", "recipe.yaml", "--to", "file/page.html"), "exists", "--to", {"file": "mine"}),
    Bad(("inspect", "recipe.yaml", "--to", "page.html"), "exists", "--to", {"page.json": "{}"}),
    Bad(("evaluate-reward", "absent/model", "absent.jsonl"), "missing", "PAIRS"),
    Bad(("evaluate-reward", "absent/model", "pairs.jsonl", "--batch-size", "0"), USAGE),
    Bad(("evaluate-reward", "a", "pairs.jsonl", "--out", "made"), "exists", "--out", {"made/x": "mine"}),
    Bad(("evaluate-reward", "a", "pairs.jsonl", "--out", "made/out"), "exists", "--out", {"made": "mine"}),
    Bad(("launch",), USAGE),
    Bad(("launch", "recipe.yaml", "--hostfile", "absent"), "missing", "--hostfile"),
    Bad(("launch", "recipe.yaml", "--hostfile", "hosts"), "empty", "--hostfile", {"hosts": "# none\n"}),
    Bad(("launch", "recipe.yaml", "--hostfile", "hosts"), "invalid", "--hostfile", {"hosts": "a slots=x\n"}),
    Bad(("launch", "recipe.yaml", "--hostfile", "hosts"), "invalid", "--hostfile", {"hosts": "a;b slots=1\n"}),
    Bad(("launch", "recipe.yaml", "--hostfile", "hosts"), "invalid", "--hostfile", {"hosts": "-oX slots=1\n"}),
    Bad(("launch", "recipe.yaml", "--hostfile", "hosts"), "unreadable", "--hostfile", {"hosts": b"\xff\xfe"}),
    Bad(("launch", "recipe.yaml", "name='x", "--hostfile", "hosts"), "conflict", "name", {"hosts": "a slots=1\n"}),
    Bad(("launch", "recipe.yaml", "--master-port", "0"), USAGE),
    Bad(("launch", "recipe.yaml", "--master-port", "70000"), USAGE),
    Bad(("launch", "recipe.yaml", "--master-port", "x"), USAGE),
    Bad(("launch", "recipe.yaml", "--num-procs", "0"), USAGE),
    Bad(("launch", "recipe.yaml", "--node-rank", "0"), "missing", "--num-nodes"),
    Bad(("launch", "recipe.yaml", "--num-nodes", "2"), "missing", "--node-rank"),
    *(
        Bad(("launch", "recipe.yaml", *NODES, "--master-addr", address), "invalid", "--master-addr")
        for address in ("", "a b", "a;b", "-oProxyCommand=x", "$(x)", "http://a")
    ),
    Bad(("launch", "recipe.yaml", "stray"), "invalid", "stray"),
    Bad(("launch", "compare_inits_small"), "conflict", "compare"),
    Bad(("compare", "recipe.yaml"), "missing", "compare"),
    Bad(("compare", "absent.yaml"), "missing", "RECIPE"),
    with_compare("{grid: {init: [lora, pissa]}, seeds: [1]}", "exists", "--dir", "--dir", "recipe.yaml/made"),
    with_compare("5", "invalid", "compare"),
    with_compare("{}", "missing", "compare.grid"),
    with_compare("{arms: [5]}", "invalid", "compare.arms.0"),
    with_compare("{arms: [{ppo: null}, {init: lora}]}", "missing", None),
    with_compare("{grid: {init: []}}", "empty", "compare.grid.init"),
    with_compare("{grid: {nonsense: [1, 2]}}", "unknown", "nonsense"),
    with_compare("{grid: {init: [lora, pisa]}}", "unknown", "adapter.init"),
    with_compare("{grid: {init: [lora, pissa]}, seeds: []}", "invalid", "compare.seeds"),
    with_compare("{grid: {init: [lora, lora]}}", "conflict", "compare.arms"),
    with_compare("{grid: {init: [lora, pissa]}, share: everything}", "invalid", "compare.share"),
    with_compare("{grid: {init: [lora, pissa]}}", "unknown", "--only", "--only", "x"),
    with_compare("{grid: {init: [lora, pissa]}}", "invalid", "--only", "--only", "runs:3/2"),
    with_compare("{grid: {init: [lora, pissa]}}", "invalid", "--only", "--only", "0/2"),
]

PIPES = [
    *(run(f"ppo.prompts=pipe{end}", kind="unreadable", **{f"pipe{end.replace('.', '__')}": None}) for end in ENDINGS),
    run("deepspeed=pipe.json", kind="unreadable", pipe__json=None),
    run("chat_template=pipe.jinja", kind="missing", pipe__jinja=None),
    Bad(("run", "pipe.yaml"), "missing", "RECIPE", {"pipe.yaml": None}),
    Bad(("winrate", "pipe.jsonl"), "unreadable", None, {"pipe.jsonl": None}),
    Bad(("winrate", "pipe.csv.gz"), "unreadable", None, {"pipe.csv.gz": None}),
    Bad(("export", "made"), "missing", None, {"made/adapter_config.json": None}),
    Bad(("evaluate-reward", "made", "pipe.jsonl"), "unreadable", "PAIRS", {"pipe.jsonl": None}),
    Bad(("launch", "recipe.yaml", "--hostfile", "pipe"), "unreadable", "--hostfile", {"pipe": None}),
    evaluate(*AGAINST, "--prompts", "pipe.jsonl", kind="unreadable", key="--prompts", pipe__jsonl=None),
]

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
SHOWN = "{{ response_a }} {{ response_b }}"


def question(template: str, kind: str, key: str | None = "judge.template") -> Bad:
    options = ("--judge", "llm:random:tiny-llama", "judge.template=t.jinja2", "function_timeout=0.5")
    return evaluate(*AGAINST, *options, kind=kind, key=key, t__jinja2=template)


TEMPLATES = [
    run("chat_template=t.jinja", "function_timeout=0.5", kind="user_code", key="", t__jinja=ENDLESS),
    run("chat_template='{% if false %}x{% endif %}'", kind="invalid"),
    run("chat_template='{{ messages|length }}'", kind="invalid"),
    question(ENDLESS, "user_code", None),
    question("", "invalid"),
    question("A or B?", "invalid"),
    question(SHOWN, "invalid"),
    question(f"{SHOWN} A?", "invalid"),
    question(f"{SHOWN} A or B? {{{{ 1 / 0 }}}}", "user_code"),
    question(f"{SHOWN} A or B? {{{{ 5 + 'a' }}}}", "user_code"),
    question(f"{SHOWN} A or B? {{% include '/etc/passwd' %}}", "user_code"),
    question(f"{SHOWN} A or B? {{% for a in range(10**9) %}}{{% endfor %}}", "user_code"),
    question(f"{SHOWN} A or B? {{% macro m() %}}{{{{ m() }}}}{{% endmacro %}}{{{{ m() }}}}", "user_code"),
]

TAKEN = [
    Bad(("run", "recipe.yaml", "--run-dir", "made"), "exists", "--run-dir", {f"made/{name}": "{}"})
    for name in (
        "comparison.yaml", "metrics.jsonl", "verdicts.jsonl", "role.json", "adapter_config.json", "summary.json",
        "report.html", "recipe.yaml",
    )
] + [
    Bad(("run", "recipe.yaml", "--run-dir", "."), "exists", "--run-dir"),
    Bad(("run", "recipe.yaml", "--run-dir", "absent/..", "--resume"), "exists", "--run-dir"),
    Bad(("evaluate-reward", "a", "pairs.jsonl", "--out", "absent/.."), "exists", "--out"),
    evaluate(*AGAINST, "--out", "absent/..", kind="exists", key="--out"),
]  # fmt: skip

ALL = [*TAKEN, *TEMPLATES, *PIPES, *VALUES, *TEXTS, *OPTIONS, *EVALUATE, *WINRATE, *OTHERS]


def test_the_table_is_long() -> None:
    assert len(ALL) >= 150


@pytest.mark.parametrize("bad", ALL, ids=lambda bad: " ".join(bad.arguments)[:60])
def test_bad_input_is_one_sentence_and_changes_nothing(bad: Bad, cli: Callable[..., Outcome], tmp_path: Path) -> None:
    stages = recipe("reward", "ppo", "evaluate")
    write_recipe(tmp_path, copy.deepcopy(stages))
    for name, content in bad.files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            os.mkfifo(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    resolve_model("random:tiny-llama")
    before = contents(tmp_path)
    outcome = cli(*bad.arguments)
    assert "Traceback" not in outcome.out + outcome.err
    assert len(outcome.errors) == 1, outcome
    found = (outcome.error.kind, outcome.error.key) if isinstance(outcome.error, Failure) else (USAGE, None)
    assert (outcome.code, *found) == (bad.code, bad.kind, bad.key), outcome.errors
    after = contents(tmp_path)
    assert {name: after.get(name) for name in before} == before
