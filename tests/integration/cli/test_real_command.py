"""`pe-rlhf` as a process of its own: what it prints, and what it does not import."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT
from tests.runs import contents, recipe, write_recipe

WITHOUT_TORCH = (
    *("pe_rlhf", "pe_rlhf.cli", "pe_rlhf.config", "pe_rlhf.config.load"),
    *("pe_rlhf.system.processes", "pe_rlhf.system.files", "pe_rlhf.system.progress", "pe_rlhf.system.failures"),
    *("pe_rlhf.report.run_page", "pe_rlhf.report.evaluation_page", "pe_rlhf.report.inspect_page"),
    *("pe_rlhf.comparison.page.comparison_page", "pe_rlhf.runs.metrics"),
)


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_what_shows_help_imports_no_torch() -> None:
    script = "import sys\n" + "\n".join(f"import {module}" for module in WITHOUT_TORCH)
    script += "\nprint([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_help_and_a_bad_recipe_do_not_wait_for_torch(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("modle: x")
    heavy = "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)))"
    for arguments, code in ((["run", "--help"], 0), (["run", "bad.yaml"], 2)):
        script = (
            f"import sys; sys.argv = ['pe-rlhf', *{arguments}]\nfrom pe_rlhf.cli.main import main\n"
            f"code = 0\ntry:\n    main()\nexcept SystemExit as end:\n    code = end.code\nprint(code); {heavy}"
        )
        done = python("-c", script, folder=tmp_path)
        assert done.stdout.splitlines()[-2:] == [str(code), "[]"], done


def test_the_real_command_says_one_sentence_and_debug_shows_the_rest(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo", ppo__kl__betta=0.1))
    before = contents(tmp_path)
    done = python("-m", "pe_rlhf", "run", str(path), folder=tmp_path)
    sentence = f"error: {path}: unknown key 'ppo.kl.betta'; did you mean 'beta'?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence)
    shown = python("-m", "pe_rlhf", "run", str(path), "--debug", folder=tmp_path)
    assert shown.returncode == 2
    assert shown.stderr.startswith("Traceback")
    assert shown.stderr.endswith(sentence)
    assert contents(tmp_path) == before


def test_a_reader_that_has_gone_is_no_mistake(tmp_path: Path) -> None:
    """As of `pe-rlhf recipes | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pe_rlhf", "recipes"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (128 + signal.SIGPIPE, "")
