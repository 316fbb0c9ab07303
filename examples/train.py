"""Train a draft for a target, measure it and export it, from Python.

    python examples/train.py --target models/SmolLM2-135M-Instruct --data configs/quickstart/conversations.jsonl

With these few samples and steps, the draft only shows that everything works. For a useful one, start from a recipe.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import specforge
from specforge.cli.main import main as specforge_command


def run(*words: object) -> None:
    """Run a `specforge` command; stop if it fails."""
    if status := specforge_command([str(word) for word in words]):
        raise SystemExit(status)


def main() -> None:
    """Prepare, capture, train, evaluate, export."""
    parser = argparse.ArgumentParser(description="Train a draft for a target, measure it and export it.")
    parser.add_argument("--target", required=True, help="folder or hub name of the target")
    parser.add_argument("--data", required=True, help="conversations, such as a .jsonl file")
    parser.add_argument("--output", type=Path, default=Path("runs/example"), help="folder for everything written")
    parser.add_argument("--holdout", type=int, default=0, help="conversations to hold out, if the data names none")
    parser.add_argument("--samples", type=int, default=200, help="training samples to capture")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--draft_vocab_size", type=int, default=2048, help="tokens that the draft can propose")
    options = parser.parse_args()
    prompts, features, training = (options.output / name for name in ("prompts", "features", "training"))

    run(
        "prepare", "--data", options.data, "--target", options.target, "--output", prompts, "--holdout", options.holdout
    )
    capture = specforge.CaptureOptions(limit_samples=options.samples)
    specforge.capture(options.target, prompts, features, capture, algorithm="eagle3", progress=True)

    # Options after the recipe replace its values, as on the command line.
    draft_config = json.dumps({"draft_vocab_size": options.draft_vocab_size})
    model = ("--model.target", options.target, "--model.steps", 3, "--model.draft_config", draft_config)
    data = ("--data.features", features, "--data.max_tokens", 1024)
    trainer = ("--trainer.max_steps", options.steps, "--trainer.default_root_dir", training)
    run("fit", "--config", "eagle3.yaml", *model, *data, *trainer)

    draft = specforge.load_draft(training / "checkpoints" / "last.ckpt")
    evaluate = specforge.EvaluateOptions(max_new_tokens=32, speed_prompts=0, baselines=["none", "ngram"])
    for method, result in specforge.evaluate(draft, prompts, evaluate, num_prompts=8, progress=True).items():
        print(f"{method:<8} tau {result.tau:.3f}  lossless {result.lossless}")

    run("export", "--draft", training / "checkpoints" / "last.ckpt", "--output", options.output / "draft")


if __name__ == "__main__":
    main()
