"""`specforge evaluate` end to end on the tiny target, and the cache of the target's own answers."""

from __future__ import annotations

import json
import multiprocessing

import pytest
import torch

from lightning_modules.loading import load_module
from specforge.cli.main import main
from specforge.contracts import CapturePolicy
from specforge.decoding.verify import Sampling
from specforge.eval.cache import EvalCache, EvalKey, Reference
from specforge.eval.evaluate import EvaluateOptions, Evaluation
from specforge.eval.report import evaluation_text
from tests.tiny import recipe

FIELDS = [
    "method",
    "prompts",
    "tokens",
    "rounds",
    "tau",
    "tau_ci95",
    "offline_tau",
    "acceptance_per_position",
    "tokens_per_second",
    "speedup",
    "speedup_ci95",
    "lossless",
]


@pytest.fixture(scope="module")
def run(target, features, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    path = recipe(target, features, folder, trainer__max_steps=60, model__init_args__optimizer={"lr": 5e-3})
    assert main(["fit", "--config", str(path), "--model.init_from", "target"]) == 0
    return folder / "run"


def evaluate(run, prompts, output, *options) -> dict:
    words = [
        "evaluate",
        "--draft",
        run / "checkpoints" / "last.ckpt",
        "--prompts",
        prompts,
        "--json",
        output,
        "--cache",
        output.parent / "cache",
        "--max_new_tokens",
        20,
        "--speed_prompts",
        2,
        *options,
    ]
    assert main([str(word) for word in words]) == 0
    return json.loads(output.read_text())


def test_the_table(run, prompts, tmp_path):
    result = evaluate(run, prompts, tmp_path / "e.json")
    assert [row["method"] for row in result["methods"]] == ["none", "ngram", "suffix", "eagle3"]
    for row in result["methods"]:
        assert [field for field in FIELDS if field not in row] == []
        assert row["prompts"] == 8
        assert row["lossless"] is True
        assert row["tau"] == pytest.approx(row["offline_tau"], abs=0.05)
        assert row["tau_ci95"][0] <= row["tau"] <= row["tau_ci95"][1]
        assert row["tau"] == pytest.approx(row["tokens"] / row["rounds"])
        assert row["tau_ci95"][0] >= 1
        assert row["tokens_per_second"] > 0
        assert row["speedup_ci95"][0] <= row["speedup"] <= row["speedup_ci95"][1]
    assert result["methods"][0]["tau"] == 1.0
    for key in ("target", "draft", "prompts", "gamma", "temperature", "dtype", "seed", "versions", "peak_memory"):
        assert key in result["run"]


def test_a_cpu_without_bf16_is_timed_in_fp32(run, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    result = evaluate(run, prompts, tmp_path / "e.json", "--device", "cpu", "--baselines", "[ngram]")
    assert result["run"]["dtype"] == result["run"]["speed_dtype"] == "float32"
    assert {row["tokens_per_second"] > 0 for row in result["methods"]} == {True}


def test_one_prompt_has_no_interval(run, prompts, tmp_path, capsys):
    result = evaluate(run, prompts, tmp_path / "e.json", "--num_prompts", 1, "--speed_prompts", 0)
    assert [row["tau_ci95"] for row in result["methods"][1:]] == [None] * 3
    assert "nan" not in capsys.readouterr().out
    assert "nan" not in str(evaluation_text(result)["rows"])


def test_sampled_evaluation(run, prompts, tmp_path, capsys):
    result = evaluate(run, prompts, tmp_path / "e.json", "--temperature", 1.0, "--speed_prompts", 0)
    row = result["methods"][-1]
    assert row["lossless"] is None
    said = " ".join(capsys.readouterr().out.split())
    assert "8 held-out prompts, gamma 4, temperature 1" in said
    assert "lossless is not measured when sampling" in said
    assert row["tau"] == pytest.approx(row["offline_tau"], abs=0.25)
    assert evaluate(run, prompts, tmp_path / "again.json", "--temperature", 1.0, "--speed_prompts", 0) | {"run": 0} == (
        result | {"run": 0}
    )


def test_a_corpus_for_suffix_decoding_and_deterministic_drafts(run, prompts, tmp_path):
    options = ("--speed_prompts", 0, "--temperature", 0.5, "--draft_sampling", "deterministic")
    result = evaluate(run, prompts, tmp_path / "e.json", *options, "--suffix_corpus", prompts / "train")
    assert result["run"]["draft_sampling"] == "deterministic"
    assert result["run"]["suffix_corpus"] == str(prompts / "train")
    without = evaluate(run, prompts, tmp_path / "w.json", *options)
    rows, others = ({row["method"]: row for row in r["methods"]} for r in (result, without))
    assert rows["eagle3"] == others["eagle3"]
    assert rows["suffix"] != others["suffix"]
    assert rows["eagle3"]["tau"] == pytest.approx(rows["eagle3"]["offline_tau"], abs=0.25)


def test_only_some_baselines(run, prompts, tmp_path, capsys):
    result = evaluate(run, prompts, tmp_path / "e.json", "--speed_prompts", 0, "--baselines", "[ngram]")
    assert [row["method"] for row in result["methods"]] == ["none", "ngram", "eagle3"]
    words = [
        "evaluate",
        "--draft",
        run / "checkpoints" / "last.ckpt",
        "--prompts",
        prompts,
        "--baselines",
        "[x]",
        "--cache",
        tmp_path / "cache",
        "--max_new_tokens",
        20,
    ]
    assert main([str(word) for word in words]) == 2
    assert "baseline x: use none, ngram, suffix" in capsys.readouterr().err


def test_the_exported_draft_earns_the_same(run, prompts, target, tmp_path):
    first = evaluate(run, prompts, tmp_path / "e.json", "--speed_prompts", 0)
    for form in ("sglang", "hf"):
        folder = tmp_path / form
        words = [
            "export",
            "--draft",
            run / "checkpoints" / "last.ckpt",
            "--output",
            folder,
            "--to",
            form,
            "--dtype",
            "float32",
        ]
        assert main([str(word) for word in words]) == 0
        words = [
            "evaluate",
            "--draft",
            folder,
            "--target",
            target,
            "--prompts",
            prompts,
            "--json",
            tmp_path / "x.json",
            "--cache",
            tmp_path / "cache",
            "--max_new_tokens",
            20,
            "--speed_prompts",
            0,
        ]
        assert main([str(word) for word in words]) == 0
        again = json.loads((tmp_path / "x.json").read_text())
        assert again["methods"] == first["methods"]


def key(**changes) -> EvalKey:
    fields = {
        "target_fingerprint": "t",
        "tokenizer_fingerprint": "k",
        "capture": CapturePolicy((1, 2)),
        "dtype": "float32",
        "device": "cpu",
        "versions": ("1",),
        "end_ids": (7,),
        "max_new_tokens": 8,
        "sampling": Sampling(),
        "seed": 0,
    }
    return EvalKey(**{**fields, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"target_fingerprint": "u"},
        {"tokenizer_fingerprint": "l"},
        {"capture": CapturePolicy((1, 3))},
        {"dtype": "bfloat16"},
        {"device": "cuda"},
        {"versions": ("2",)},
        {"end_ids": (7, 8)},
        {"max_new_tokens": 9},
        {"sampling": Sampling(1.0)},
        {"seed": 1},
    ],
)
def test_the_cache_is_keyed_by_everything_that_changes_the_features(changes):
    prompts = [[1, 2], [3]]
    assert key(**changes).digest(prompts) != key().digest(prompts)
    assert key().digest([[1, 2], [3]]) != key().digest([[1], [2, 3]])


def produce(counter) -> list[Reference]:
    with counter.get_lock():
        counter.value += 1
    return [Reference([1, 2], [3, 4], {"x": torch.ones(4, 2)})]


def read(folder, counter) -> None:
    (reference,) = EvalCache(folder).get(key(), [[1, 2]], lambda: produce(counter))
    assert reference.answer == [3, 4]


def test_answers_are_produced_once_whoever_asks(tmp_path):
    context = multiprocessing.get_context("fork")
    counter = context.Value("i", 0)
    processes = [context.Process(target=read, args=(tmp_path / "cache", counter)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    read(tmp_path / "cache", counter)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert counter.value == 1


def test_progress_counts_every_decoded_prompt(run, target, tmp_path):
    module = load_module(run / "checkpoints" / "last.ckpt", str(target)).eval()
    for cached in (False, True):
        seen: list[tuple[int, int]] = []
        options = EvaluateOptions(max_new_tokens=8, speed_prompts=2, batch_size=2, device="cpu")
        cache, progress = EvalCache(tmp_path), lambda *x, seen=seen: seen.append(x)
        evaluation = Evaluation(module.target, module, [], "t", cache, options, progress=progress)
        evaluation.run([[1, 2, 3], [4, 5], [6]])
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1] == (3 * 4 + 2 * 4, 20), cached
