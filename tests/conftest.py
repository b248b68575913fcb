import atexit
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything imports the hub's client: no test may depend on the network, or wait for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before torch is imported: on tiny tensors a second thread costs more than it gives, on a busy machine ten times more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pe_rlhf.adapters.kind import KINDS
from pe_rlhf.adapters.lora.init_registry import INITS
from pe_rlhf.cli.main import main
from pe_rlhf.config.adapter import INIT_OPTIONS
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.rollout.vllm.embedded import RANK_VARIABLES
from reward.errors import Failure
from tests import device
from tests.paths import SHARED_DATA
from tests.runs import Outcome, contents
from tests.tiny import EOS, FAMILIES, VOCABULARY, Settings, tiny_model

# A stage collects garbage at its end: what was imported is never any, and takes most of a second to look through.
gc.freeze()
atexit.register(gc.unfreeze)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the models of the unit tier compute: cpu, cuda, cuda:1, …")


def pytest_configure(config: pytest.Config) -> None:
    device.choose(str(config.getoption("--device")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    device.skip_others(items)


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Every architecture in turn."""
    return request.param


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def tiny_gpt2() -> PreTrainedModel:
    return tiny_model("gpt2")


@pytest.fixture
def tiny_gpt_neo() -> PreTrainedModel:
    return tiny_model("gpt_neo")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """One word per id, `w5` for 5; end of sequence and padding are the same token, as in many real tokenizers."""
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    end = f"w{EOS}"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w2", eos_token=end, pad_token=end)


@pytest.fixture
def saved_model(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> Callable[[PreTrainedModel], Path]:
    """Save a model with the tiny tokenizer, as a directory that `load_backbone` takes."""

    def save(model: PreTrainedModel) -> Path:
        path = tmp_path / "model"
        model.save_pretrained(path)
        tiny_tokenizer.save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data beside the checkout; the test is skipped where it is missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the shared test data (../shared/data beside the checkout) is missing")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _no_launcher() -> Iterator[None]:
    """A launcher's variables that a library sets are gone after the file: later runs would wait for other ranks."""
    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def _own_registries() -> Iterator[None]:
    """An init or kind that a test registers is gone after the test: others count what there is."""
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = [(of, dict(of)) for of in (INITS, INIT_OPTIONS, KINDS)]
    yield
    for registry, entries in kept:
        registry.clear()
        registry.update(entries)


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that runs of the tests make, apart from the user's."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def quantisable_model(tmp_path_factory: pytest.TempPathFactory, model_cache: Path) -> Path:
    """A tiny Llama on the disk whose sides bitsandbytes takes, with the tokenizer of the tiny random model."""
    path = tmp_path_factory.mktemp("quantisable")
    sizes: Settings = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "head_dim": 32}
    tiny_model("llama", vocab_size=257, **sizes).save_pretrained(path)
    load_backbone("random:tiny-llama").tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def data_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `datasets` keeps its copy of each file that it reads, apart from the user's."""
    path = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(path))
    return path


@pytest.fixture
def cli(
    model_cache: Path,
    data_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Callable[..., Outcome]]:
    """The command line in this process, with the test's folder as the working directory.

    What a run imports from there and the threads it sets do not outlast the test.
    """
    threads, path, modules = torch.get_num_threads(), list(sys.path), set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PE_RLHF_CACHE", str(model_cache))

    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["pe-rlhf", *map(str, arguments)])
        code: str | int | None = 0
        error = None
        try:
            main()
        except SystemExit as end:
            code, error = end.code, end.__context__
        assert isinstance(code, int)
        said = capsys.readouterr()
        return Outcome(code, said.out, said.err, error)

    yield call
    torch.set_num_threads(threads)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.fixture
def fails(cli: Callable[..., Outcome], tmp_path: Path) -> Callable[..., Failure]:
    """Call the command line with something that is wrong, and return the failure that it reports in one line.

    Nothing that was in the test's folder before may have changed.
    """

    def call(*arguments: str | Path, code: int = 2) -> Failure:
        before = contents(tmp_path)
        outcome = cli(*arguments)
        assert outcome.code == code, outcome
        assert "Traceback" not in outcome.out + outcome.err
        assert isinstance(outcome.error, Failure), outcome
        assert outcome.errors == [" ".join(str(outcome.error).split())]
        after = contents(tmp_path)
        assert {name: after.get(name) for name in before} == before
        return outcome.error

    return call


@pytest.fixture
def refused(cli: Callable[..., Outcome], tmp_path: Path) -> Callable[..., str]:
    """Call the command line with something that is wrong, and return the one sentence that it says.

    Nothing that was in the test's folder before may have changed.
    """

    def call(*arguments: str | Path, code: int = 2) -> str:
        before = contents(tmp_path)
        outcome = cli(*arguments)
        assert outcome.code == code, outcome
        assert "Traceback" not in outcome.out + outcome.err
        assert len(outcome.errors) == 1, outcome
        after = contents(tmp_path)
        assert {name: after.get(name) for name in before} == before
        return outcome.errors[0]

    return call
