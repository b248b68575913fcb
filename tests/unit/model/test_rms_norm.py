import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.model.fast.rms_norm import shorten_norms
from tests.pairwise import every_pair
from tests.tiny import IDS_BT, tiny_model, with_gradient

SIZE = 24


def norm_of(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    norm = kind(SIZE)
    with torch.no_grad():
        for weight in norm.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(1))
    return norm.to(dtype).requires_grad_(False)


def shortened(norm: nn.Module) -> nn.Module:
    short = copy.deepcopy(norm)
    shorten_norms(short)
    return short


def is_short(norm: nn.Module) -> bool:
    return "forward" in vars(norm)


@every_pair(
    kind=(LlamaRMSNorm, MistralRMSNorm, Qwen3RMSNorm),
    dtype=(torch.float32, torch.bfloat16, torch.float16),
    shape=((2, 5, SIZE), (2, 3, 5, SIZE)),  # hidden states, heads
)
def test_numbers_are_those_of_transformers_to_the_bit_and_gradients_autograds(
    kind: type[nn.Module], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    norm = norm_of(kind, dtype)
    short = shortened(norm)
    assert is_short(short)
    hidden = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (found, gradient), (expected, expected_gradient) = with_gradient(short, hidden), with_gradient(norm, hidden)
    assert torch.equal(found, expected)
    ulp = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    torch.testing.assert_close(gradient, expected_gradient, rtol=ulp, atol=ulp)


def test_in_bf16_no_copy_in_fp32_is_kept() -> None:
    short, kept = shortened(norm_of(LlamaRMSNorm, torch.bfloat16)), list[Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        short(torch.randn(2, 5, SIZE, dtype=torch.bfloat16, requires_grad=True))
    assert [tensor.dtype for tensor in kept if tensor.numel() == 2 * 5 * SIZE] == [torch.bfloat16]


@pytest.mark.parametrize(
    "norm",
    [GemmaRMSNorm(SIZE), MambaRMSNormGated(SIZE), Gemma4RMSNorm(SIZE, with_scale=False)],
    ids=["times 1 + weight", "takes a gate", "has no weight"],
)
def test_a_norm_that_is_another_is_left_alone(norm: nn.Module) -> None:
    with torch.no_grad():
        for weight in norm.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(1))
    assert not is_short(shortened(norm.requires_grad_(False)))


def test_a_copy_that_is_trained_has_gradients_of_its_weights() -> None:
    norm = norm_of(LlamaRMSNorm, torch.float32)
    trained, plain = copy.deepcopy(shortened(norm)).requires_grad_(True), norm.requires_grad_(True)
    hidden = torch.randn(2, 5, SIZE)
    for module in (trained, plain):
        module(hidden).square().sum().backward()
    (weight,), (expected,) = trained.parameters(), plain.parameters()
    assert weight.grad is not None
    assert expected.grad is not None
    assert torch.equal(weight.grad, expected.grad)


def test_a_backbone_has_short_norms_and_the_logits_of_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        expected = model(input_ids=IDS_BT).logits
    backbone = load_backbone(model)
    norms = [module for module in backbone.modules() if isinstance(module, LlamaRMSNorm)]
    assert len(norms) == 5
    assert all(map(is_short, norms))
    with torch.no_grad():
        assert torch.equal(backbone(IDS_BT).logits, expected)
