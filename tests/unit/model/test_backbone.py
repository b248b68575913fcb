"""The backbone as its users see it: loading, the outputs of every role, gradient checkpointing."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereForCausalLM,
    Gemma2ForCausalLM,
    GenerationConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import pe_rlhf
from pe_rlhf.adapters.layer import WrappedLayer
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.model.fast.packed_attention import ATTENTION
from reward.errors import Kind
from tests.failures import raises
from tests.tiny import (
    EOS,
    IDS_BT,
    INITS,
    PAD,
    ROLES,
    VOCABULARY,
    backbone_with,
    perturb,
    ragged_sequences,
    randomise_head,
    role_logits,
    rows_of,
    set_fast,
    tiny_model,
)


def test_the_public_interface(tmp_path: Path, family: str) -> None:
    backbone = pe_rlhf.load_backbone(tiny_model(family))
    assert isinstance(backbone, pe_rlhf.Backbone)
    for role in ROLES:
        backbone.add_adapter(role, init="pissa", rank=4, alpha=8)
    shapes = {"anchor": (2, 5, VOCABULARY), "policy": (2, 5, VOCABULARY), "value": (2, 5, 1), "reward": (2, 1)}
    assert backbone.roles == list(shapes)
    for name, shape in shapes.items():
        with backbone.role(name) as playing:
            assert playing is backbone
            assert backbone.active_role == name
            assert backbone(IDS_BT).logits.shape == shape
            assert backbone(input_ids=IDS_BT, attention_mask=torch.ones_like(IDS_BT)).logits.shape == shape
        if name != "anchor":
            backbone.export_adapter(name, tmp_path / name)
            assert (tmp_path / name / "adapter_model.safetensors").is_file()


class ShapesSeen(TorchDispatchMode):
    """The shapes of all tensors that operations are given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.shapes |= {tuple(value.shape) for value in args if isinstance(value, Tensor)}
        return func(*args, **(kwargs or {}))


def test_the_head_is_one_matrix_for_all_rows() -> None:
    """Not one for each, as torch has it where hidden states do not lie side by side: copies of it, on a CPU in bf16."""
    model, ids_BT = backbone_with().model, torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad(), ShapesSeen() as seen:
        model(input_ids=ids_BT, logits_to_keep=1)  # as `generate` reads a prompt
    assert (VOCABULARY, 32) in seen.shapes
    assert not {(2, VOCABULARY, 32), (2, 32, VOCABULARY)} & seen.shapes


def test_a_backbones_model_can_be_pickled(tiny_llama: PreTrainedModel) -> None:
    backbone = Backbone(Backbone(tiny_llama).model)  # twice, and its head has one hook
    head = backbone.model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    assert len(head._forward_pre_hooks) == 1
    loaded = pickle.loads(pickle.dumps(backbone.model))
    assert torch.equal(loaded(input_ids=IDS_BT).logits, backbone(IDS_BT).logits)


def test_a_directory_is_loaded_with_its_tokenizer(saved_model: Callable[[PreTrainedModel], Path], family: str) -> None:
    original = tiny_model(family)
    backbone = load_backbone(saved_model(original))
    with torch.no_grad():
        assert torch.equal(backbone(IDS_BT).logits, original(IDS_BT).logits)
    assert backbone.tokenizer("w5 w6")["input_ids"] == [5, 6]
    assert backbone.pad_token_id == EOS
    assert backbone.max_positions == 64
    assert backbone.device == torch.device("cpu")
    # GPT-Neo has no sdpa: asking for the default must not refuse the model.
    expected = {"llama": ATTENTION, "gpt2": ATTENTION, "gpt_neo": "eager"}[family]
    assert backbone.model.config._attn_implementation == expected


def test_dtype_and_attention_are_settings(saved_model: Callable[[PreTrainedModel], Path]) -> None:
    original = tiny_model("llama")
    backbone = load_backbone(saved_model(original), dtype="bfloat16", attention="eager")
    backbone.add_adapter("value", init="pissa", rank=3)
    assert backbone.model.config._attn_implementation == "eager"
    assert {tensor.dtype for tensor in backbone.role_state("value").values()} == {torch.float32}
    assert {p.dtype for name, p in backbone.model.named_parameters() if "lora" not in name} == {torch.bfloat16}
    with torch.no_grad():
        torch.testing.assert_close(backbone(IDS_BT).logits.float(), original(IDS_BT).logits, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("changes", "kind", "key"),
    [({"dtype": "float8"}, "unknown", "dtype"), ({"attention": "spda"}, "unreadable", "model")],
)
def test_a_setting_that_is_not_known_is_refused(
    changes: dict[str, str], kind: Kind, key: str, saved_model: Callable[[PreTrainedModel], Path]
) -> None:
    with raises(kind, key=key):
        load_backbone(saved_model(tiny_model("llama")), **changes)  # type: ignore[arg-type]


def test_a_dtype_may_be_torchs(saved_model: Callable[[PreTrainedModel], Path]) -> None:
    assert load_backbone(saved_model(tiny_model("llama")), dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_a_model_that_cannot_be_had_is_refused() -> None:
    with raises("unreadable", key="model", file="nobody/nothing"):
        load_backbone("nobody/nothing")


def test_without_a_tokenizer_the_backbone_still_pads(tiny_llama: PreTrainedModel) -> None:
    backbone = load_backbone(tiny_llama)
    assert backbone.pad_token_id == EOS
    with raises("missing", key="tokenizer"):
        _ = backbone.tokenizer


def test_every_end_of_sequence_id_is_known(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model("llama", eos_token_id=3)
    model.generation_config = GenerationConfig(eos_token_id=[7, 3], top_k=5, repetition_penalty=1.3)
    backbone = load_backbone(model, tokenizer=tiny_tokenizer)
    assert backbone.eos_token_ids == [EOS, 3, 7]
    # The checkpoint's sampling defaults would change the distribution that log-probs are computed of.
    assert backbone.model.generation_config.top_k is None
    assert backbone.model.generation_config.repetition_penalty is None


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("from_directory", [False, True])
def test_dropout_of_the_base_is_off_in_either_mode(
    architecture: str, from_directory: bool, saved_model: Callable[[PreTrainedModel], Path]
) -> None:
    names = {"gpt2": ["attn_pdrop", "resid_pdrop", "embd_pdrop"], "llama": ["attention_dropout"]}[architecture]
    with_dropout = tiny_model(architecture, torch.float32, **dict.fromkeys(names, 0.1))
    expected = tiny_model(architecture)(IDS_BT).logits
    assert not torch.allclose(with_dropout.train()(IDS_BT).logits, expected)  # the premise
    backbone = load_backbone(saved_model(with_dropout) if from_directory else with_dropout)
    backbone.add_adapter("value", init="pissa", rank=3)
    set_fast(backbone, gradient_checkpointing=True)
    head = backbone.heads["value"]
    randomise_head(backbone, "value")
    for mode in (True, False):
        backbone.train(mode)
        assert torch.equal(backbone(IDS_BT).logits, expected)
        with backbone.role("value"):
            hidden_BTH = tiny_model(architecture).base_model(IDS_BT).last_hidden_state
            assert torch.equal(backbone(IDS_BT).logits, head(hidden_BTH)[..., None])


def test_dropout_modules_of_the_base_are_at_zero_whoever_turns_them_on() -> None:
    expected = tiny_model("gpt2")(IDS_BT).logits
    backbone = load_backbone(tiny_model("gpt2", torch.float32, attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1))
    backbone.model.train()
    assert torch.equal(backbone(IDS_BT).logits, expected)


def test_dropout_of_adapters_is_on_in_train_mode_alone() -> None:
    backbone = load_backbone(tiny_model("llama"))
    backbone.add_adapter("policy", init="pissa", rank=3, dropout=0.5)
    assert torch.equal(role_logits(backbone, "policy"), role_logits(backbone, "anchor"))
    perturb(backbone, "policy")
    still = role_logits(backbone, "policy")
    backbone.train()
    assert backbone.training
    assert not torch.equal(role_logits(backbone, "policy"), still)
    backbone.add_adapter("other", init="lora", rank=3, dropout=0.5)  # a role that comes later is in the same mode
    perturb(backbone, "other")
    assert not torch.equal(role_logits(backbone, "other"), role_logits(backbone, "other"))
    backbone.eval()
    assert torch.equal(role_logits(backbone, "policy"), still)


# What families do to their logits after the head; 0.1, 2 and 3 are far from what random weights would hide.
TRANSFORMED: dict[str, tuple[type[PreTrainedModel], dict[str, Any]]] = {
    "soft cap": (Gemma2ForCausalLM, {"final_logit_softcapping": 2.0, "head_dim": 8}),
    "multiplied": (CohereForCausalLM, {"logit_scale": 0.1}),
    "divided": (GraniteForCausalLM, {"logits_scaling": 3.0}),
}


@pytest.mark.parametrize("change", TRANSFORMED)
@torch.no_grad()
def test_models_that_transform_their_logits(change: str) -> None:
    model_class, changes = TRANSFORMED[change]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": PAD}
    assert model_class.config_class is not None
    model = model_class(model_class.config_class(**sizes, **heads, **changes)).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    original = copy.deepcopy(model)
    original.set_attn_implementation("eager")  # Gemma 2 caps its attention, which sdpa leaves out
    backbone = load_backbone(model)
    backbone.add_adapter("policy", init="pissa", rank=3)
    sequences = ragged_sequences()
    with backbone.role("policy"):
        found_N, _ = backbone.response_logprobs(sequences)
    expected = []
    for prompt, response in rows_of(sequences):
        logits_TV = original(input_ids=torch.tensor([prompt + response])).logits[0]
        logprobs_RV = torch.log_softmax(logits_TV[len(prompt) - 1 : -1], -1)
        expected.append(logprobs_RV[torch.arange(len(response)), torch.tensor(response)])
    torch.testing.assert_close(found_N, torch.cat(expected), atol=1e-5, rtol=1e-5)


class Doubling(LlamaForCausalLM):
    """A model that does to its logits what no known setting says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_a_model_with_logits_of_its_own_is_refused() -> None:
    with raises("conflict", key="model"):
        load_backbone(Doubling(tiny_model("llama").config))


def step_gradients(backbone: Backbone) -> dict[str, Tensor]:
    """Gradients of one backward pass through policy and value, after both of their contexts have ended."""
    sequences = ragged_sequences()
    torch.manual_seed(0)
    with backbone.role("policy"):
        logprobs_N, _ = backbone.response_logprobs(sequences)
    with backbone.role("value"):
        values_N = backbone.response_values(sequences)
    (values_N.square().mean() - logprobs_N.mean()).backward()
    gradients: dict[str, Tensor] = {}
    for role in ("policy", "value"):
        for name, parameter in backbone.role_parameters(role).items():
            assert parameter.grad is not None, (role, name)
            gradients[f"{role}.{name}"], parameter.grad = parameter.grad, None
    return gradients


@pytest.mark.parametrize("init", INITS)
def test_checkpointing_gives_the_same_gradients_whichever_role_is_active_then(family: str, init: str) -> None:
    backbone = load_backbone(tiny_model(family))
    for role in ("policy", "value"):
        backbone.add_adapter(role, init=init, rank=3, dropout=0.2)
        perturb(backbone, role)
    backbone.train()
    expected = step_gradients(backbone)
    set_fast(backbone, gradient_checkpointing=True)
    calls: list[int] = []
    layer = next(module for module in backbone.model.modules() if isinstance(module, WrappedLayer))
    layer.register_forward_hook(lambda *_: calls.append(1))
    found = step_gradients(backbone)
    assert len(calls) == 4  # policy and value, each computed and recomputed
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())
    assert all(gradient.any() for gradient in found.values())
    assert backbone.active_role == "anchor"


def test_checkpointing_leaves_scoring_and_generation_alone(family: str) -> None:
    backbone = backbone_with("policy", family=family)
    perturb(backbone, "policy")
    expected = role_logits(backbone, "policy")
    backbone.train()
    set_fast(backbone, gradient_checkpointing=True)
    assert torch.equal(role_logits(backbone, "policy"), expected)
    with backbone.role("policy"):  # a step of training, as before every rollout but the first
        backbone.response_logprobs(ragged_sequences())[0].sum().backward()

    lengths: list[int] = []
    backbone.model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: lengths.append(args[0].shape[-1]))
    config = GenerationConfig(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=PAD)
    mask_BT = torch.ones_like(IDS_BT)
    with backbone.role("policy"):
        found = backbone.model.generate(IDS_BT, attention_mask=mask_BT, generation_config=config)  # type: ignore[operator]
    assert lengths == [5, 1, 1, 1]  # the KV cache is used
    plain = backbone_with("policy", family=family)
    perturb(plain, "policy")
    with plain.role("policy"):
        assert torch.equal(found, plain.model.generate(IDS_BT, attention_mask=mask_BT, generation_config=config))  # type: ignore[operator]
