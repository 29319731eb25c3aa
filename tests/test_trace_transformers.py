"""Tracing transformers models: staged runs are bitwise equal to eager ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.run import check_exact
from torch import nn

from planner.errors import TraceError
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


def _t5(use_cache: bool = False) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0, use_cache=use_cache,
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


@pytest.mark.parametrize("num_key_value_heads", [1, 2])
def test_attention_is_causal_without_a_mask(num_key_value_heads: int) -> None:
    # As in eager mode: positions are constants, so transformers sees that it needs no mask.
    def build() -> nn.Module:
        config = transformers.LlamaConfig(
            **_SMALL, num_key_value_heads=num_key_value_heads, use_cache=False
        )
        return transformers.LlamaForCausalLM(config)

    graph = check_exact(build, _tokens)
    blocks = [layer for layer in graph.layers if layer.name.startswith("model.layers.")]
    given = [dict(statement.keywords) for layer in blocks for statement in layer.code]
    assert [keywords["attention_mask"] for keywords in given if "attention_mask" in keywords] == [
        None, None
    ]  # fmt: skip


def test_a_mask_of_the_batch_is_passed_on() -> None:
    def example_batch(batch_size: int) -> dict[str, torch.Tensor]:
        tokens = _tokens(batch_size)
        mask = torch.ones_like(tokens["input_ids"])
        mask[:, :2] = 0
        return tokens | {"attention_mask": mask}

    check_exact(_llama, example_batch)


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


def _reformer() -> nn.Module:
    config = transformers.ReformerConfig(
        vocab_size=64, hidden_size=16, feed_forward_size=32, attn_layers=["local"] * 4,
        num_attention_heads=2, attention_head_size=8, axial_pos_shape=[2, 4], is_decoder=True,
        axial_pos_embds_dim=[8, 8], local_attn_chunk_length=4, max_position_embeddings=8,
    )  # fmt: skip
    return transformers.ReformerModelWithLMHead(config)


def _wav2vec2() -> nn.Module:
    config = transformers.Wav2Vec2Config(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, conv_dim=(8,), conv_stride=(5,), conv_kernel=(10,),
        num_feat_extract_layers=1, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config)


def _t5_with_cache() -> nn.Module:
    return _t5(use_cache=True)


def _sounds(batch_size: int) -> dict[str, torch.Tensor]:
    labels = torch.randint(1, 64, (batch_size, 2))
    return {"input_values": torch.randn(batch_size, 800), "labels": labels}


@pytest.mark.parametrize(
    ("build", "example_batch", "words"),
    [
        (
            _reformer,
            _tokens,
            (
                "autograd function _ReversibleFunction between its layers",
                "in module 'reformer.encoder'",
                "hidden_states = _ReversibleFunction.apply(",
                "put it into an nn.Module of its own",
            ),
        ),
        (
            _wav2vec2,
            _sounds,
            ("between its layers", "if labels is not None and labels.max() >=", "torch.where"),
        ),
        (
            _t5_with_cache,
            _tokens,
            ("module 'decoder.block.0'", "= layer_module(", "use_cache = False"),
        ),
    ],
)
def test_what_cannot_be_traced_is_named_with_its_line_and_a_way_out(
    build: Callable[[], nn.Module], example_batch: Callable[[int], Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(TraceError) as caught:
        trace(model_from_functions(build, example_batch))
    for word in words:
        assert word in str(caught.value)
