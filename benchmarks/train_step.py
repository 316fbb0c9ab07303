"""Forward and backward of one training step: CPU time, peak memory, gradient error.

    python -m benchmarks.train_step --algorithm eagle3 --shape tiny --threads 1 --json step.json

The block drafters (dflash, dpace, dspark, domino) train one layer on 64 blocks of 16 tokens per document, over the
whole vocabulary. Domino has a GRU and a correction of width 64, and weighs base and final loss equally.

Each variant runs in a process of its own, on random features: `fast` is the module as `specforge fit` runs it; `naive`
is a straightforward implementation of the same loss (dense masks, every row, full logits, ordinary autograd). Results
are medians over the timed steps. The gradient error is relative to the naive variant in fp64.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, TrainBatch, mask_spans
from specforge.inference.target_head import TargetHead
from specforge.system import keep_freed_memory


@dataclass(frozen=True)
class Shape:
    """Dimensions of target and draft, and of a batch; ``prompt`` is the share of rows that are not supervised."""

    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    draft_vocab: int
    length: int
    batch: int
    steps: int
    prompt: float


SHAPES = {
    "tiny": Shape(256, 4, 2, 1024, 4096, 4096, 512, 2, 7, 1 / 8),
    "chat": Shape(256, 4, 2, 1024, 4096, 4096, 512, 2, 7, 1 / 2),
    "smollm2": Shape(576, 9, 3, 1536, 49152, 4096, 512, 2, 3, 1 / 2),
}


def write_target(shape: Shape, folder: Path) -> str:
    """Write the config, embedding and head of a target with random weights; a draft reads nothing else."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_hidden_layers": 16,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 2048,
    }
    (folder / "config.json").write_text(json.dumps(config))
    names = ("model.embed_tokens.weight", "lm_head.weight")
    save_file({name: torch.randn(shape.vocab, shape.hidden) * 0.05 for name in names}, folder / "model.safetensors")
    return str(folder)


def make_batch(shape: Shape) -> TrainBatch:
    """Documents of random features, each a prompt and an answer."""
    g = torch.Generator().manual_seed(0)
    tokens = shape.length * shape.batch
    mask = (torch.arange(shape.length) >= shape.prompt * shape.length).repeat(shape.batch)
    lengths = (shape.length,) * shape.batch
    features = {
        AUX_HIDDEN_STATES: torch.randn(tokens, 3 * shape.hidden, generator=g),
        LAST_HIDDEN_STATES: torch.randn(tokens, shape.hidden, generator=g) * 4,
    }
    ids = torch.randint(0, shape.vocab, (tokens,), generator=g)
    return TrainBatch(ids, mask, features, lengths, mask_spans(mask, lengths))


BLOCKS: dict[str, tuple[str, dict[str, str | float]]] = {
    "dflash": ("dflash", {}),
    "dpace": ("dflash", {"weights": "dpace"}),
    "dspark": ("dspark", {}),
    "domino": ("domino", {"base_start": 0.5}),
}


def make_module(algorithm: str, shape: Shape):
    """The module of `specforge fit`, with a fixed vocabulary; its target need not stay on disk."""
    from lightning_modules import algorithms

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        target = write_target(shape, Path(folder))
        if algorithm in BLOCKS:
            name, options = BLOCKS[algorithm]
            config: dict[str, object] = {"num_hidden_layers": 1, "block_size": 16}
            if name == "domino":
                config["dflash_config"] = {"gru_hidden_dim": 64, "emb_dim": 64}
            module = algorithms()[name](target, draft_config=config, layer_ids=[1, 7, 12], anchors=64, **options)
            if name == "domino":
                module.horizon = 1.0  # λ is base_start, as at a run's first step
        else:
            module = algorithms()[algorithm](
                target, draft_config={"draft_vocab_size": shape.draft_vocab}, steps=shape.steps, label="data"
            )
            if shape.draft_vocab < shape.vocab:
                module.draft.set_vocabulary(torch.arange(shape.draft_vocab))
        module.target_head(torch.device("cpu"))
        _ = module.target.fingerprint
    return module


def fast_step(algorithm: str, shape: Shape, precision: str) -> tuple[Callable[[], Tensor], torch.nn.Module]:
    """The step as `specforge fit` computes it."""
    module, batch = make_module(algorithm, shape), make_batch(shape)
    head = module.target_head(torch.device("cpu"))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    head = TargetHead(head.embedding, head.head, dtype)
    batch.features = {name: x.to(dtype) for name, x in batch.features.items()}

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = module.training_loss(batch, head).loss
        loss.backward()
        return loss.detach()

    return step, module.draft


def naive_step(algorithm: str, shape: Shape, precision: str) -> tuple[Callable[[], Tensor], torch.nn.Module]:
    """The same loss with dense S x S masks, logits of every row, and autograd."""
    from benchmarks import naive_blocks, naive_eagle3

    module, batch = make_module(algorithm, shape), make_batch(shape)
    head, draft = module.target_head(torch.device("cpu")), module.draft
    dtype = {"fp32": torch.float32, "fp64": torch.float64}[precision]
    draft.to(dtype)
    weights = (head.embedding.to(dtype), head.head.weight.to(dtype))

    def step() -> Tensor:
        if algorithm in BLOCKS:
            loss = naive_blocks.naive_loss(module, batch, *weights)
        else:
            loss = naive_eagle3.naive_loss(
                draft, batch, *weights, steps=shape.steps, length=shape.length, decay=module.step_decay
            )
        loss.backward()
        return loss.detach()

    return step, draft


def gradients(algorithm: str, variant: str, shape: Shape, precision: str) -> Tensor:
    """Gradients of one step, end to end, in fp64."""
    step, draft = {"fast": fast_step, "naive": naive_step}[variant](algorithm, shape, precision)
    step()
    return torch.cat([p.grad.double().flatten() for _, p in sorted(draft.named_parameters()) if p.grad is not None])


def measure(algorithm: str, variant: str, shape: Shape, precision: str, count: int) -> dict[str, float]:
    """Medians over ``count`` steps, after two warm-up steps."""
    keep_freed_memory()
    step, draft = {"fast": fast_step, "naive": naive_step}[variant](algorithm, shape, precision)
    seconds, loss = [], torch.zeros(())
    for number in range(count + 2):
        draft.zero_grad()
        start = time.process_time()
        loss = step()
        if number >= 2:
            seconds.append(time.process_time() - start)
    return {
        "cpu_seconds_per_step": statistics.median(seconds),
        "cpu_seconds_min": min(seconds),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "loss": float(loss),
    }


def in_a_process(*arguments: object) -> dict[str, float]:
    """Run this file on one variant in a separate process, to measure its peak memory."""
    command = [sys.executable, "-m", "benchmarks.train_step", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # type: ignore[no-any-return]


def main() -> None:
    """Measure each variant; print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", choices=["eagle3", *BLOCKS], default="eagle3")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the headline figures")
    parser.add_argument("--steps", type=int, default=9, help="timed steps")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs=2, metavar=("VARIANT", "PRECISION"), help=argparse.SUPPRESS)
    parser.add_argument("--error", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = SHAPES[options.shape]
    if options.only:
        print(json.dumps(measure(options.algorithm, options.only[0], shape, options.only[1], options.steps)))
        return
    if options.error:
        exact = gradients(options.algorithm, "naive", shape, "fp64")
        forms = [("fast", "fp32"), ("fast", "bf16"), ("naive", "fp32")]
        print(
            json.dumps(
                {
                    " ".join(f): float((gradients(options.algorithm, f[0], shape, f[1]) - exact).norm() / exact.norm())
                    for f in forms
                }
            )
        )
        return
    words = (
        f"--algorithm {options.algorithm} --shape {options.shape} --threads {options.threads} --steps {options.steps}"
    )
    common = words.split()
    variants = {
        f"{variant} {precision}": in_a_process(*common, "--only", variant, precision)
        for variant, precision in (("fast", "fp32"), ("fast", "bf16"), ("naive", "fp32"))
    }
    for name, error in in_a_process(*common, "--error").items():
        variants[name]["gradient_error"] = error
    result = {
        "algorithm": options.algorithm,
        "shape": options.shape,
        "threads": options.threads,
        "precision": options.precision,
        **variants[f"fast {options.precision}"],
        "variants": variants,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{'variant':<12} {'CPU-s/step':>10} {'min':>7} {'peak MiB':>9} {'gradient error':>15}")
    for name, row in variants.items():
        print(
            f"{name:<12} {row['cpu_seconds_per_step']:>10.3f} {row['cpu_seconds_min']:>7.3f} "
            f"{row['peak_rss_mib']:>9.0f} {row['gradient_error']:>15.1e}"
        )


if __name__ == "__main__":
    main()
