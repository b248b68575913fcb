import pytest

from pe_rlhf.adapters.targets import Targets, find_targets, linear_modules
from pe_rlhf.model.backbone import load_backbone
from reward.errors import InputError
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
    with pytest.raises(InputError, match=rf"'{target}'.*q_proj"):
        find_targets(tiny_model("llama"), ["v_proj", target])


def test_wrapped_layers_keep_their_names(family: str) -> None:
    model = tiny_model(family)
    before = list(linear_modules(model))
    load_backbone(model).add_adapter("policy", rank=2, targets="attention")
    assert list(linear_modules(model)) == before
