"""What is handed to others: the wheel with its recipes, and scripts that a shell can read."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import pe_rlhf
from tests.paths import ROOT
from tests.unit.test_layering import imports


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built in an environment of its own, into which pip fetches the build backend."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "Could not find a version that satisfies the requirement hatchling" in done.stderr:
        pytest.skip("hatchling, which builds the wheel, cannot be fetched")
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_packages_recipes_and_launch_files(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name == f"pe_rlhf-{pe_rlhf.__version__}-py3-none-any.whl"
    sources = {path.relative_to(ROOT).as_posix() for package in ("pe_rlhf", "reward") for path in files(package)}
    carried = [path.relative_to(ROOT).as_posix() for path in [*files("recipes"), *files("launch")]]
    bundled = {f"pe_rlhf/_bundled/{path}" for path in carried}
    assert "pe_rlhf/_bundled/recipes/data/quickstart_prompts.jsonl" in bundled
    assert sources | bundled == {name for name in names if ".dist-info/" not in name}


def files(folder: str) -> list[Path]:
    return [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]


@pytest.mark.slow
def test_the_installed_package_finds_its_recipes_anywhere(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    command = [sys.executable, "-P", "-m", "pe_rlhf", "run", "smoke", "--dry-run"]
    done = subprocess.run(
        command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    stages = "preferences → reward → ppo → evaluate"
    plan = f"smoke: {stages} with random:tiny-llama, into runs/smoke; the recipe is valid"
    assert done.stdout.splitlines()[0] == plan
    assert list((tmp_path / "elsewhere").iterdir()) == []
    where = "import pe_rlhf, reward; print(pe_rlhf.__file__, reward.__file__)"
    found = subprocess.run(
        [sys.executable, "-P", "-c", where], env=environment, capture_output=True, text=True, check=True
    )
    assert all(path.startswith(str(tmp_path / "site")) for path in found.stdout.split())  # the premise


@pytest.mark.parametrize("script", [*sorted((ROOT / "launch").glob("*.s*h*")), ROOT / ".ci" / "run"], ids=str)
def test_shell_scripts_parse(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    text = script.read_text()
    assert text.startswith("#!/bin/bash\n")
    assert "set -euo pipefail" in text


def test_the_launch_script_calls_the_command_with_options_that_it_has(tmp_path: Path) -> None:
    """`srun` here prints what it would run: the script itself is the real one."""
    fake = tmp_path / "bin" / "srun"
    fake.parent.mkdir()
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{fake.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    script = str(ROOT / "launch" / "slurm_one_gpu.sbatch")
    command = ["bash", script, "recipes/smoke.yaml", "seed=1", "name=a b"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    expected = ["pe-rlhf", "run", "recipes/smoke.yaml", "seed=1", "name=a b", "--run-dir", "runs/smoke-17", "--resume"]
    assert done.stdout.splitlines() == expected
    unnamed = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
    assert unnamed.returncode != 0
    assert "name a recipe" in unnamed.stderr


BROUGHT_ALONG = {"numpy", "huggingface_hub", "tokenizers", "markupsafe", "pydantic_core"}  # by those that are named
OPTIONAL = {"vllm", "deepspeed", "wandb", "vaderSentiment"}


def test_what_the_package_imports_is_installed_with_it() -> None:
    """The development environment has more: an import that only it satisfies fails for users."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {re.split(r"[^\w-]", requirement)[0].replace("-", "_") for requirement in project["dependencies"]}
    modules = {"yaml" if name == "pyyaml" else name for name in named}
    imported = {
        name.split(".")[0]
        for package in ("pe_rlhf", "reward")
        for path in files(package)
        if path.suffix == ".py"
        for name in imports(path)
    }
    own = {"pe_rlhf", "reward", *sys.stdlib_module_names}
    assert imported - own - modules - BROUGHT_ALONG == OPTIONAL


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == pe_rlhf.__version__
