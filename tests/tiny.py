"""A target so small that everything real runs on it in milliseconds, and conversations and a recipe for it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = ("What is {a} plus {b}?", "Name {a} birds and {b} fish.", "Say {a} words about the number {b}.")
ANSWERS = (
    "{a} plus {b} is {c}.",
    "Here are {a} birds and {b} fish: one, two, three.",
    "The number {b} is {b}, {b}, {a}.",
)


# With what options every shipped recipe of a module is run on the tiny target, whose features hold layers 1, 3 and 4.
TINY_OPTIONS: dict[str, dict[str, object]] = {
    "Eagle3Module": {"layer_ids": [1, 3, 4], "draft_config": {"draft_vocab_size": 64}},
    "DFlashModule": {"layer_ids": [1, 3, 4], "draft_config": {"draft_vocab_size": 64}},
    "DSparkModule": {"layer_ids": [1, 3, 4], "draft_config": {"draft_vocab_size": 64}},
    "DFlash2Module": {
        "layer_ids": [1, 3, 4],
        "draft_config": {"draft_vocab_size": 64, "dflash_config": {"selector_rank": 8}},
    },
    "DominoModule": {
        "layer_ids": [1, 3, 4],
        "draft_config": {"draft_vocab_size": 64, "dflash_config": {"gru_hidden_dim": 16, "emb_dim": 8}},
    },
    "HydraModule": {"draft_config": {"draft_vocab_size": 64}},
    "MedusaModule": {"draft_config": {"draft_vocab_size": 64}},
    "MTPModule": {"draft_config": {"draft_vocab_size": 64}, "init_from": "target"},
    "PEagleModule": {"layer_ids": [1, 3, 4], "draft_config": {"draft_vocab_size": 64, "num_hidden_layers": 2}},
    "StandaloneModule": {"draft": None, "draft_config": {"num_hidden_layers": 2}},
}


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 256 bytes and three special tokens, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def write_target(
    folder: Path, seed: int = 0, layers: int = 8, hidden: int = 32, vocab_size: int = 264, heads: int = 4
) -> Path:
    """A random Llama of a few thousand weights, saved as users' targets are: config, safetensors, tokenizer."""
    write_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=min(257, vocab_size - 1),
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def conversation(index: int) -> dict[str, object]:
    """One of the made-up conversations; the first eight of every hundred are held out."""
    words = {"a": index % 7 + 2, "b": index % 11 + 3, "c": index % 7 + index % 11 + 5}
    question, answer = (texts[index % 3].format(**words) for texts in (QUESTIONS, ANSWERS))
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": f"c{index}", "split": "heldout" if index % 100 < 8 else "train", "messages": messages}


def write_conversations(path: Path, count: int = 40) -> Path:
    """A file of conversations."""
    path.write_text("".join(json.dumps(conversation(i)) + "\n" for i in range(count)))
    return path


def recipe(target: Path, features: Path, folder: Path, **changes: object) -> Path:
    """A YAML file for `specforge fit` on the tiny target; ``changes`` are dotted keys with ``__`` for the dot."""
    config: dict[str, object] = {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 6,
            "default_root_dir": str(folder / "run"),
            "enable_progress_bar": False,
            "precision": "32-true",
            "log_every_n_steps": 1,
        },
        "model": {
            "class_path": "Eagle3Module",
            "init_args": {
                "target": str(target),
                "steps": 3,
                "draft_config": {"draft_vocab_size": 64},
                "optimizer": {"lr": 1e-3},
            },
        },
        "data": {"class_path": "OfflineDataModule", "init_args": {"features": str(features), "batch_size": 4}},
    }
    for key, value in changes.items():
        place: dict = config
        *parents, last = key.split("__")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    path = folder / "recipe.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return path
