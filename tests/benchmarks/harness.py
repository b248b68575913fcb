"""Run benchmark commands in turn, each in a process of its own, and print their times and peak memory side by side.

    trl = {"TRL 1.12": trl_ppo_command(model, prompts, steps=3)}
    table(run_alternating({"pe-rlhf": [sys.executable, "own.py", ...], **trl}, rounds=3), baseline="TRL 1.12")

Every command takes `--output FILE.json` and writes a JSON object with at least `seconds_per_step` and
`tokens_per_step`, two lists with one number per step. Linux only: it reads /proc/cpuinfo and memory in KiB.
"""

import gzip
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PEERS = Path(__file__).parent / "peers"
TRL_WITH_PPO = "1.12.0"

# A child's ru_maxrss starts at its parent's own peak, because fork and exec carry it over. So the command is started
# and measured by this small process (about 10 MB) and not by the harness, which may have loaded a model.
_LAUNCHER = """
import os, sys
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
with open(sys.argv[1], "w") as file:
    file.write(str(usage.ru_maxrss))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def run_alternating(
    commands: dict[str, list[str]], rounds: int, directory: Path | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Run all commands in turn, `rounds` times (A B A B …), so that a slow spell of the machine meets them all.

    Returns, per name, what each run wrote, with `peak_rss_mib` measured from outside (of the largest process, where a
    command starts several). `<name>-<round>.json` and `.log` stay in `directory` (default: a new temporary one).
    Raises RuntimeError with the end of the log when a command fails.
    """
    directory = directory or Path(tempfile.mkdtemp(prefix="pe-rlhf-benchmark-"))
    directory.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for number in range(1, rounds + 1):
        for name, command in commands.items():
            stem = directory / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-{number}"
            results[name].append(_run(name, command, stem))
    return results


def _run(name: str, command: list[str], stem: Path) -> dict[str, Any]:
    report, log, peak = (stem.with_name(stem.name + suffix) for suffix in (".json", ".log", ".maxrss"))
    report.unlink(missing_ok=True)
    launcher = [sys.executable, "-S", "-c", _LAUNCHER, str(peak)]
    with log.open("w") as file:
        code = subprocess.call([*launcher, *command, "--output", str(report)], stdout=file, stderr=subprocess.STDOUT)
    if code != 0 or not report.exists():
        end = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"{name} ended with exit code {code}; the end of {log}:\n{end}")
    result = json.loads(report.read_text()) | {"peak_rss_mib": int(peak.read_text()) / 1024}
    report.write_text(json.dumps(result, indent=1) + "\n")
    peak.unlink()
    return result


def table(results: dict[str, list[dict[str, Any]]], baseline: str, console: Console | None = None) -> None:
    """Print medians with min–max over all steps of all rounds, and their ratios to the run named `baseline`.

    A ratio is median / median of the baseline: below 1 is faster, or smaller, than the baseline.
    """
    printed = Table(title=f"{machine()}, {date.today().isoformat()}")
    for heading in ("", "s / step", "ratio", "peak MiB", "ratio", "tokens / step", "steps"):
        printed.add_column(heading, justify="right" if heading else "left", overflow="fold")
    base_seconds, base_peaks, _ = _measurements(results[baseline])
    for name, runs in results.items():
        seconds, peaks, tokens = _measurements(runs)
        printed.add_row(
            name,
            _spread(seconds, ".1f"),
            f"{statistics.median(seconds) / statistics.median(base_seconds):.2f}",
            _spread(peaks, ",.0f"),
            f"{statistics.median(peaks) / statistics.median(base_peaks):.2f}",
            _spread(tokens, ",.0f"),
            str(len(seconds)),
        )
    (console or Console()).print(printed)


def _measurements(runs: Sequence[dict[str, Any]]) -> tuple[list[float], list[float], list[float]]:
    seconds = [value for run in runs for value in run["seconds_per_step"]]
    tokens = [value for run in runs for value in run["tokens_per_step"]]
    return seconds, [run["peak_rss_mib"] for run in runs], tokens


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}}\n({min(values):{form}}–{max(values):{form}})"


def machine() -> str:
    """The machine class in one line: usable cores, CPU model, torch version."""
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    model = match.group(1) if match else platform.machine()
    return f"{len(os.sched_getaffinity(0))} cores, {model}, torch {version('torch')}"


def install_trl_ppo() -> Path:
    """The directory that holds TRL 1.12.0, installed there by pip, without dependencies, when it is missing."""
    cache = Path(os.environ.get("PE_RLHF_CACHE", "~/.cache/pe-rlhf")).expanduser()
    target = cache / "peers" / f"trl-{TRL_WITH_PPO}"
    if not target.exists():
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial)]
        subprocess.run([*pip, f"trl=={TRL_WITH_PPO}"], check=True)
        partial.rename(target)
    return target


def trl_ppo_command(model: Path, prompts: Path, steps: int, *options: str) -> list[str]:
    """The command that times PPO in TRL 1.12 on the first 16 · `steps` prompts."""
    script = [sys.executable, str(PEERS / "trl_ppo.py"), "--model", str(model)]
    return [
        "env",
        f"PYTHONPATH={install_trl_ppo()}",
        *script,
        "--prompts",
        str(prompts),
        "--steps",
        str(steps),
        *options,
    ]


def trl_reward_command(model: Path, pairs: Path, tuning: str, steps: int, *options: str) -> list[str]:
    """The command that times reward training in the installed TRL; `tuning` is `lora` or `full`."""
    script = [sys.executable, str(PEERS / "trl_reward.py"), "--model", str(model), "--pairs", str(pairs)]
    return [*script, "--tuning", tuning, "--steps", str(steps), *options]


def first_turns(pairs: Path) -> Iterator[str]:
    """The first human turn of each dialogue in a gzipped hh-rlhf file."""
    with gzip.open(pairs, "rt") as lines:
        for line in lines:
            yield json.loads(line)["chosen"].split("\n\nAssistant:")[0].removeprefix("\n\nHuman:").strip()


def write_prompts(texts: Iterable[str], model: Path, output: Path, count: int, max_tokens: int = 64) -> None:
    """Write the first `count` different texts that, whole, take at most `max_tokens` tokens.

    With the chat template, if the model has one.
    No text is cut, so every prompt is a real question and lengths vary as they do in the source. The file has one
    JSON object a line, with the user's text under `prompt`; whoever reads it applies the chat template.
    """
    from transformers import AutoTokenizer  # here, because only this function needs it and it loads slowly

    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokens(text: str) -> int:
        if tokenizer.chat_template is None:
            return len(tokenizer(text)["input_ids"])
        turn = [{"role": "user", "content": text}]
        return len(tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"])

    fitting = (text for text in dict.fromkeys(texts) if tokens(text) <= max_tokens)
    chosen = list(islice(fitting, count))
    if len(chosen) < count:
        raise ValueError(f"{count} prompts of up to {max_tokens} tokens are needed, {len(chosen)} were found")
    output.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in chosen))
