"""Models of different kinds, large enough that a step on one CPU core is work rather than calls.

Examples of this project with larger constants, and transformers models with random weights. This
file knows models. It does not know what is measured of them.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from planner.model_file import ModelFile, load_model_file, model_from_functions

__all__ = ["MODELS", "SizedModel"]

EXAMPLES = Path(__file__).parents[2] / "examples"
WIDTH, LENGTH, VOCABULARY = 256, 128, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedModel:
    """A model and the micro-batch size it is measured at."""

    model_file: Callable[[], ModelFile]
    micro_batch_size: int


def example(name: str, **constants: Any) -> Callable[[], ModelFile]:
    """One of this project's examples, some of its constants replaced."""

    def load() -> ModelFile:
        model_file = load_model_file(str(EXAMPLES / f"{name}.py"))
        module = sys.modules[model_file.build_model.__module__]
        for constant, value in constants.items():
            assert hasattr(module, constant), f"{name} has no {constant}"
            setattr(module, constant, value)
        return model_file

    return load


def own(
    build_model: Callable[[], nn.Module],
    example_batch: Callable[[int], dict[str, Tensor]],
    loss_fn: Callable[[Any, Mapping[str, Tensor]], Tensor] | None = None,
) -> Callable[[], ModelFile]:
    return lambda: model_from_functions(build_model, example_batch, loss_fn=loss_fn)


def tokens_and_labels(batch_size: int) -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (batch_size, LENGTH))
    return {"input_ids": tokens, "labels": tokens.clone()}


def images_and_labels(batch_size: int) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(batch_size, 3, 64, 64),
        "labels": torch.randint(10, (batch_size,)),
    }


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=WIDTH, n_layer=6, n_head=4,
        use_cache=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=688, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, use_cache=False,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=6, num_attention_heads=4,
        intermediate_size=4 * WIDTH,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=64, d_ff=4 * WIDTH, num_layers=3, num_heads=4,
        use_cache=False, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=6, num_attention_heads=4, intermediate_size=4 * WIDTH,
        image_size=64, patch_size=8, num_labels=10,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


class Encoder(nn.Module):
    """torch's own encoder over vectors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.encoder(x).mean(1))
        return output


def vectors_and_classes(batch_size: int) -> dict[str, Tensor]:
    return {
        "x": torch.randn(batch_size, LENGTH, WIDTH),
        "labels": torch.randint(10, (batch_size,)),
    }


def classes_loss(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(output, batch["labels"])


class Recommender(nn.Module):
    """Embedding tables and a deep perceptron over all of their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(5000, 32) for _ in range(8))
        widths = [8 * 32, 1024, 1024, 512, 1]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)
        )

    def forward(self, items: Tensor) -> Tensor:
        hidden = torch.cat([table(items[:, i]) for i, table in enumerate(self.tables)], dim=-1)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.squeeze(-1)


def items_and_clicks(batch_size: int) -> dict[str, Tensor]:
    return {"items": torch.randint(5000, (batch_size, 8)), "clicks": torch.rand(batch_size)}


def clicks_loss(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(output, batch["clicks"])


MODELS = {
    "mlp": SizedModel(model_file=example("mlp", WIDTH=512), micro_batch_size=64),
    "gpt": SizedModel(
        model_file=example("gpt", WIDTH=WIDTH, CONTEXT=LENGTH, NUM_BLOCKS=6), micro_batch_size=4
    ),
    "resnet": SizedModel(
        model_file=example("resnet", WIDTHS=(32, 32, 64, 128)), micro_batch_size=8
    ),
    "unet": SizedModel(model_file=example("unet"), micro_batch_size=16),
    "gpt2": SizedModel(model_file=own(gpt2, tokens_and_labels), micro_batch_size=4),
    "llama": SizedModel(model_file=own(llama, tokens_and_labels), micro_batch_size=4),
    "mixtral": SizedModel(model_file=own(mixtral, tokens_and_labels), micro_batch_size=4),
    "bert": SizedModel(model_file=own(bert, tokens_and_labels), micro_batch_size=4),
    "t5": SizedModel(model_file=own(t5, tokens_and_labels), micro_batch_size=4),
    "vit": SizedModel(model_file=own(vit, images_and_labels), micro_batch_size=8),
    "encoder": SizedModel(
        model_file=own(Encoder, vectors_and_classes, classes_loss), micro_batch_size=4
    ),
    "recommender": SizedModel(
        model_file=own(Recommender, items_and_clicks, clicks_loss), micro_batch_size=256
    ),
}
