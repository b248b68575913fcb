import re

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from pe_rlhf.adapters.targets import (
    Targets,
    find_targets,
    linear_modules,
    say_what_is_left_out,
    share_without_adapter,
)
from pe_rlhf.model.backbone import load_backbone
from tests.failures import raises
from tests.model_types import build
from tests.tiny import tiny_model

ATTENTION = {
    "llama": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
    "gpt2": ["attn.c_attn", "attn.c_proj"],
    "gpt_neo": ["attn.attention.k_proj", "attn.attention.v_proj", "attn.attention.q_proj", "attn.attention.out_proj"],
}
MLP = {
    "llama": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "gpt2": ["mlp.c_fc", "mlp.c_proj"],
    "gpt_neo": ["mlp.c_fc", "mlp.c_proj"],
}
SELF = ["q_proj", "k_proj", "v_proj", "o_proj"]
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "gpt_neo": "transformer.h"}


def names(family: str, parts: list[str]) -> set[str]:
    return {f"{BLOCKS[family]}.{block}.{part}" for block in (0, 1) for part in parts}


def test_all_linear_is_every_projection_but_the_head(family: str) -> None:
    found = find_targets(tiny_model(family), "all-linear")
    assert set(found) == names(family, ATTENTION[family] + MLP[family])
    assert len(found) == len(set(found))


def test_all_linear_leaves_out_an_untied_head() -> None:
    found = find_targets(tiny_model("llama", tie_word_embeddings=False), "all-linear")
    assert not any("lm_head" in name for name in found)


def test_attention_is_known_by_the_parent(family: str) -> None:
    # GPT-2 calls the output of its attention and of its MLP alike `c_proj`.
    assert set(find_targets(tiny_model(family), "attention")) == names(family, ATTENTION[family])


@pytest.mark.parametrize(
    ("name", "expected", "bare"),
    [
        ("qwen3_next", {"0.linear_attn": ["in_proj_qkvz", "in_proj_ba", "out_proj"], "1.self_attn": SELF}, None),
        ("lfm2", {"1.self_attn": [*SELF[:3], "out_proj"]}, 1),
        ("jamba", {"1.self_attn": SELF}, 1),
    ],
)
def test_attention_of_hybrids_is_also_linear_and_blocks_without_any_are_said(
    name: str, expected: dict[str, list[str]], bare: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(name)
    found = find_targets(model, "attention")
    assert set(found) == {f"model.layers.{block}.{part}" for block, parts in expected.items() for part in parts}
    say_what_is_left_out(model, found, "attention")
    assert re.findall(r"in (\d+) blocks", capsys.readouterr().err) == ([] if bare is None else [str(bare)])


def test_a_model_without_attention_has_no_such_targets() -> None:
    with raises("conflict", key="adapter.targets"):
        find_targets(build("mamba"), "attention")


@pytest.mark.parametrize(
    ("architecture", "targets", "expected"),
    [
        ("llama", ["q_proj", "v_proj"], names("llama", ["self_attn.q_proj", "self_attn.v_proj"])),
        ("llama", "down_proj", names("llama", ["mlp.down_proj"])),
        ("llama", ["model.layers.1.mlp.up_proj"], {"model.layers.1.mlp.up_proj"}),
        ("gpt2", ["c_proj"], names("gpt2", ["attn.c_proj", "mlp.c_proj"])),
        ("gpt2", ["attn.c_proj"], names("gpt2", ["attn.c_proj"])),
        ("gpt_neo", ["attention.out_proj", "c_fc"], names("gpt_neo", ["attn.attention.out_proj", "mlp.c_fc"])),
    ],
)
def test_a_list_names_modules_or_their_endings(architecture: str, targets: Targets, expected: set[str]) -> None:
    assert set(find_targets(tiny_model(architecture), targets)) == expected


@pytest.mark.parametrize("target", ["q_prj", "proj", "lm_head", "layers"])
def test_a_name_that_matches_nothing_is_refused_with_what_there_is(target: str) -> None:
    with raises("unknown", key="adapter.targets"):
        find_targets(tiny_model("llama"), ["v_proj", target])


def test_wrapped_layers_keep_their_names(family: str) -> None:
    model = tiny_model(family)
    before = list(linear_modules(model))
    load_backbone(model).add_adapter("policy", rank=2, targets="attention")
    assert list(linear_modules(model)) == before


# Two blocks, hidden size 32, 4 heads of 8 over 2 key-value heads, MLPs of 48: the parameters of one block.
ATTENTION_WEIGHTS = 32 * 32 + 2 * 32 * 16 + 32 * 32  # q, k and v, o: 3,072
DENSE_WEIGHTS = 3 * 32 * 48  # gate, up, down: 4,608
GATE_UP_WEIGHTS, DOWN_WEIGHTS, ROUTER_WEIGHTS = 4 * 96 * 32, 4 * 32 * 48, 4 * 32  # of 4 experts: 12,288, 6,144 and 128


def sized(kind: str) -> PreTrainedModel:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    if kind == "plain":
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4))


@pytest.mark.parametrize(
    ("kind", "targets", "takes_experts", "left", "names"),
    [
        ("plain", "all-linear", False, 0, []),
        ("plain", "attention", False, DENSE_WEIGHTS, ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]),
        ("plain", ["up_proj", "down_proj"], False, ATTENTION_WEIGHTS + 32 * 48, None),
        ("mixture", "all-linear", True, ROUTER_WEIGHTS, ["mlp.gate"]),
        (
            *("mixture", "all-linear", False, GATE_UP_WEIGHTS + DOWN_WEIGHTS + ROUTER_WEIGHTS),
            ["experts.down_proj", "experts.gate_up_proj", "mlp.gate"],
        ),
        (
            *("mixture", ["experts.down_proj"], True, ATTENTION_WEIGHTS + GATE_UP_WEIGHTS + ROUTER_WEIGHTS),
            None,
        ),
    ],
)
def test_the_share_of_the_weights_that_get_no_adapter(
    kind: str, targets: Targets, takes_experts: bool, left: int, names: list[str] | None
) -> None:
    """By hand; embeddings, head and norms count neither as weights nor as left out. The same beside an adapter."""
    mixture = GATE_UP_WEIGHTS + DOWN_WEIGHTS + ROUTER_WEIGHTS
    block = ATTENTION_WEIGHTS + (DENSE_WEIGHTS if kind == "plain" else mixture)
    backbone = load_backbone(sized(kind))
    chosen = find_targets(backbone.model, targets, takes_experts=takes_experts)
    for adapters in range(2):
        share, called = share_without_adapter(backbone.model, chosen)
        assert share == pytest.approx(left / block)
        assert names is None or called == names
        backbone.add_adapter(f"role_{adapters}", rank=2, targets="attention")


@pytest.mark.parametrize(
    ("kind", "takes_experts", "share"), [("plain", False, None), ("mixture", True, None), ("mixture", False, "86%")]
)
def test_what_the_run_says_of_it(
    kind: str, takes_experts: bool, share: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """18,560 of 21,632 weights; the router by itself, 0.6 %, is not worth a line. It is said once for a model."""
    model = sized(kind)
    for _ in range(2):
        say_what_is_left_out(
            model, find_targets(model, "all-linear", takes_experts=takes_experts), "all-linear", None, takes_experts
        )
    assert re.findall(r"\d+%", capsys.readouterr().err) == ([] if share is None else [share])
