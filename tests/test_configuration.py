"""`lga-plan config.json` and `lga-run`: transformers configurations in place of model files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from commands import command
from planned import assert_same
from test_run import plan

from planner.cli.plan import main as lga_plan
from planner.errors import UsageError
from planner.model_file import DEFAULT_SEQUENCE_LENGTH, load_model_file
from planner.plan.file import read_plan
from runtime.inputs import load_inputs
from runtime.launch import main as lga_run

pytest.importorskip("transformers")

EXAMPLE = Path(__file__).parent.parent / "examples" / "llama-8b.json"
TINY: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32,
}  # fmt: skip
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **TINY}
GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 1, "embd_pdrop": 0.1, "eos_token_id": 1, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 32, "n_embd": 16, "n_head": 2,
    "n_layer": 4, "n_positions": 32, "resid_pdrop": 0.1, "vocab_size": 64,
}  # fmt: skip
OTHERS = {
    "gpt2": GPT2,
    "qwen2": {"model_type": "qwen2", "torch_dtype": "bfloat16", "rope_theta": 1e6, **TINY},
    "qwen3": {"model_type": "qwen3", "dtype": "float16", "head_dim": 8, **TINY},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "rope_theta": 1e6, **TINY},
    "mistral": {"model_type": "mistral", "sliding_window": 8, **TINY},
}


def write(folder: Path, fields: Any, name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return path


def refused(folder: Path, model: str, *options: str) -> str:
    """What lga-plan says when it refuses, without its line breaks; it writes nothing."""
    output = folder / "a.plan.yaml"
    words = [model, "--gpus", "2", "--cluster", "a100-80", "--output", str(output), *options]
    result: Result = CliRunner().invoke(lga_plan, words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert "try:" in result.output
    assert not output.exists()
    return " ".join(result.output.split())


@pytest.fixture
def planned(tmp_path: Path) -> tuple[Path, str]:
    """A plan of two ranks for samples of 12 tokens, and the configuration that it is of."""
    config = str(write(tmp_path, LLAMA, "tiny.json"))
    path = plan(
        tmp_path, config, "--gpus", "2", "--pipeline-ranks", "2", "--stages-per-rank", "2",
        "--batch-size", "4", "--micro-batches", "2", "--no-recompute", "--sequence-length", "12",
    )  # fmt: skip
    return path, config


def test_the_plan_knows_the_sequence_length(planned: tuple[Path, str]) -> None:
    written, model_file = load_inputs(*planned)
    assert [(spec.name, spec.shape[1:]) for spec in written.batch] == [
        ("input_ids", (12,)), ("labels", (12,))
    ]  # fmt: skip
    assert_same(model_file, written)


@pytest.mark.slow
def test_train_from_a_configuration(planned: tuple[Path, str]) -> None:
    path, config = planned
    result = command(path.parent, "lga-run", str(path), config, "--verify", "--steps", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "verify: passed" in result.stdout


def test_a_plan_of_another_configuration(planned: tuple[Path, str]) -> None:
    path, _ = planned
    other = write(path.parent, LLAMA | {"hidden_size": 32, "max_position_embeddings": 8})
    mixed = CliRunner().invoke(lga_run, [str(path), str(other)])
    assert mixed.exit_code == 2
    assert "was made for another model" in mixed.output


@pytest.mark.parametrize("name", OTHERS)
def test_plan_any_causal_language_model(name: str, tmp_path: Path) -> None:
    config = write(tmp_path, OTHERS[name], f"{name}.json")
    options = "--gpus 4 --pipeline-ranks 4 --stages-per-rank 1 --micro-batches 2 --no-recompute"
    written = read_plan(plan(tmp_path, str(config), *options.split()))
    assert written.model_name == name
    assert written.batch[0].shape[1] == 32  # all the positions that it has
    wanted = OTHERS[name].get("torch_dtype", OTHERS[name].get("dtype", "float32"))
    assert {unit.dtype for unit in written.units} == {wanted}


def test_the_example_is_llama_of_eight_billion() -> None:
    model_file = load_model_file(str(EXAMPLE))
    assert model_file.example_batch(1)["input_ids"].shape == (1, DEFAULT_SEQUENCE_LENGTH)
    model_file = load_model_file(str(EXAMPLE), sequence_length=8192)
    batch = model_file.example_batch(2)
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "input_ids": (2, 8192), "labels": (2, 8192)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("{", "config.json is not valid JSON"),
        ([1], "it holds a list, but no model_type"),
        ({"hidden_size": 8}, "it has hidden_size, but no model_type"),
        ({"model_type": 3}, "no model_type"),
        ({"model_type": "lama"}, "knows no model_type 'lama' try: did you mean llama?"),
        (LLAMA | {"num_attention_heads": "many"}, "transformers refuses it"),
        ({"model_type": "t5"}, "of model_type 't5', which is no causal language model"),
        ({"model_type": "bart"}, "which is no causal language model"),
        ({"model_type": "vit"}, "which is no causal language model"),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "'bert' (architectures: BertForMaskedLM), which is no causal language model",
        ),
    ],
)
def test_what_is_no_configuration_of_a_causal_language_model(
    fields: Any, words: str, tmp_path: Path
) -> None:
    assert words in refused(tmp_path, str(write(tmp_path, fields)))


def test_sequence_lengths_that_cannot_be(tmp_path: Path) -> None:
    config = str(write(tmp_path, LLAMA))
    said = refused(tmp_path, config, "--sequence-length", "33")
    assert "--sequence-length is 33, but the model of" in said
    assert "has 32 positions" in said
    assert "try: give at most 32" in said
    with pytest.raises(UsageError, match="--sequence-length is 0"):
        load_model_file(config, sequence_length=0)
    example = str(EXAMPLE.with_name("mlp.py"))
    said = refused(tmp_path, example, "--sequence-length", "8")
    assert "mlp.py is no transformers configuration" in said


def test_a_missing_configuration(tmp_path: Path) -> None:
    write(tmp_path, LLAMA)
    said = refused(tmp_path, str(tmp_path / "confg.json"))
    assert "there is no configuration" in said
    assert "did you mean" in said


def test_without_transformers(tmp_path: Path) -> None:
    """In a process of its own, that cannot import it."""
    config = write(tmp_path, LLAMA)
    script = (
        "import sys; sys.modules['transformers'] = None; from planner.cli.plan import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(config), "--gpus", "1"],
        capture_output=True, text=True, cwd=tmp_path, check=False, timeout=200,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "transformers cannot be imported" in result.stderr
    assert "pip install 'lga-plan[hf]'" in result.stderr
