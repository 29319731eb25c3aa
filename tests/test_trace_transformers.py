"""Tracing transformers models: staged runs are bitwise equal to eager ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.run import check_exact
from torch import nn

from planner.measure import measure
from planner.model_file import model_from_functions
from planner.trace import trace

transformers = pytest.importorskip("transformers")

_SMALL = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False,
        bos_token_id=None, eos_token_id=None, loss_type="ForCausalLM",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(**_SMALL, num_key_value_heads=2, use_cache=False)
    return transformers.LlamaForCausalLM(config)


def _mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        **_SMALL, num_key_value_heads=2, num_local_experts=4, use_cache=False
    )
    return transformers.MixtralForCausalLM(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**_SMALL))


def _vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def _tokens(batch_size: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(64, (batch_size, 8))
    return {"input_ids": tokens, "labels": tokens.clone()}


def _images(batch_size: int) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(batch_size, 3, 16, 16),
        "labels": torch.randint(2, (batch_size,)),
    }


@pytest.mark.parametrize(
    ("build", "num_blocks"),
    [(_gpt2, 2), (_llama, 2), (_mixtral, 2), (_t5, 4), (_bert, 2), (_vit, 2)],
)
def test_exact(build: Callable[[], nn.Module], num_blocks: int) -> None:
    example_batch = _images if build is _vit else _tokens
    # T5's decoder blocks use the encoder's output twice each.
    graph = check_exact(build, example_batch, sizes=(1, 3), rounding=build is _t5)
    blocks = [layer for layer in graph.layers if layer.name.rpartition(".")[2].isdigit()]
    assert len(blocks) == num_blocks


def test_grouped_query_attention() -> None:
    # Traced, transformers passes the causal mask on; eager, it calls another kernel without one.
    def build() -> nn.Module:
        config = transformers.LlamaConfig(**_SMALL, num_key_value_heads=1, use_cache=False)
        return transformers.LlamaForCausalLM(config)

    check_exact(build, _tokens, rounding=True)


def test_model_output_reaches_loss_fn() -> None:
    def loss_fn(output: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        assert type(output).__name__ == "MaskedLMOutput"
        return nn.functional.cross_entropy(output.logits.flatten(0, 1), batch["target"].flatten())

    def example_batch(batch_size: int) -> dict[str, torch.Tensor]:
        tokens = _tokens(batch_size)
        return {"input_ids": tokens["input_ids"], "target": tokens["labels"]}

    graph = check_exact(_bert, example_batch, loss_fn)
    assert graph.loss_keys == ("target",)
    assert any(s.function == "unflatten" for s in graph.layers[-1].code)


def test_rotary_tables_are_recomputed_not_sent() -> None:
    graph = check_exact(_llama, _tokens)
    assert any(s.path == "model.rotary_emb" for s in graph.prologue)
    assert all(len(layer.inputs) <= 1 for layer in graph.layers)


def test_equal_blocks_share_a_signature() -> None:
    graph = check_exact(_gpt2, _tokens)
    blocks = [layer for layer in graph.layers if layer.name.startswith("transformer.h.")]
    assert len({layer.signature for layer in blocks}) == 1
    assert len({layer.signature for layer in graph.layers}) == len(graph.layers) - 1
    assert graph.tied_parameters == {"transformer.wte.weight": (0, len(graph.layers) - 1)}


def test_seventy_billion_parameters() -> None:
    def build() -> nn.Module:
        config = transformers.LlamaConfig(
            vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
            num_attention_heads=64, num_key_value_heads=8, use_cache=False,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    def example_batch(batch_size: int) -> dict[str, torch.Tensor]:
        tokens = torch.zeros(batch_size, 2048, dtype=torch.long)
        return {"input_ids": tokens, "labels": tokens}

    traced = trace(model_from_functions(build, example_batch))
    graph = traced.layer_graph(1)
    assert sum(spec.num_elements for spec in graph.parameters) == 70_553_706_496
    assert len(graph.layers) == 83
    assert len({layer.signature for layer in graph.layers}) == 4
    block = measure(traced, 1).layers[40]
    products = 2 * 2048 * 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672)
    attention = 2 * 2 * 2048 * 2048 * 8192
    assert block.forward_flop == products + attention
