"""The options of every algorithm: those recorded at 60c5b28, from before they were inherited, each with a help text."""

from __future__ import annotations

import inspect

import jsonargparse
import pytest

from lightning_modules import algorithms

OPTIMIZER = {
    "optimizer.name": "adamw",
    "optimizer.lr": 0.0001,
    "optimizer.betas": (0.9, 0.95),
    "optimizer.weight_decay": 0.0,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_ratio": 0.015,
    "optimizer.decay_ratio": 0.2,
    "optimizer.min_lr_ratio": 0.0,
}
ADDED_TO_ALL = {"checkpoint_activations": "mlp", "fuse": True, "fp8": False}
OPTIONS = {
    "dflash": {
        "target": None,
        "draft_config": None,
        "layer_ids": None,
        "init_from": None,
        "anchors": 512,
        "weights": "decay",
        "decay": None,
        "alpha": 0.5,
        "label": "data",
        "anchor_seed": 0,
        "gamma": None,
        "chunk": None,
    },
    "dflash2": {
        "target": None,
        "draft_config": None,
        "layer_ids": None,
        "init_from": None,
        "anchors": 512,
        "decay": None,
        "selector": 1.0,
        "label": "data",
        "anchor_seed": 0,
        "gamma": None,
        "chunk": None,
    },
    "domino": {
        "target": None,
        "draft_config": None,
        "layer_ids": None,
        "init_from": None,
        "anchors": 256,
        "decay": None,
        "base_start": 1.0,
        "base_decay": 0.5,
        "label": "data",
        "anchor_seed": 0,
        "gamma": None,
        "chunk": None,
    },
    "dspark": {
        "target": None,
        "draft_config": None,
        "layer_ids": None,
        "init_from": None,
        "anchors": 512,
        "decay": None,
        "ce": 0.1,
        "l1": 0.9,
        "confidence": 1.0,
        "label": "data",
        "anchor_seed": 0,
        "gamma": None,
        "chunk": None,
    },
    "eagle3": {
        "target": None,
        "draft_config": None,
        "layer_ids": None,
        "init_from": None,
        "steps": 7,
        "step_decay": 0.8,
        "loss": "kl",
        "lk_eta": 3.0,
        "topk": 10,
        "feature_weight": 0.0,
        "label": "target",
        "gamma": 4,
        "chunk": None,
    },
    "hydra": {
        "target": None,
        "draft_config": None,
        "init_from": None,
        "head_decay": 0.8,
        "loss": "ce",
        "lk_eta": 3.0,
        "label": "data",
        "gamma": None,
        "chunk": None,
    },
    "medusa": {
        "target": None,
        "draft_config": None,
        "init_from": None,
        "head_decay": 0.8,
        "loss": "ce",
        "lk_eta": 3.0,
        "label": "data",
        "gamma": None,
        "chunk": None,
    },
    "mtp": {
        "target": None,
        "draft_config": None,
        "init_from": None,
        "steps": 3,
        "step_decay": 0.6,
        "loss": "ce",
        "lk_eta": 3.0,
        "label": "data",
        "gamma": 3,
        "chunk": None,
    },
    "peagle": {
        "target": None,
        "draft_config": None,
        "layer_ids": None,
        "init_from": None,
        "depths": 8,
        "keep_ratio": 0.8,
        "keep_least": 0.2,
        "loss": "kl",
        "lk_eta": 3.0,
        "topk": 10,
        "label": "target",
        "gamma": None,
        "chunk": None,
    },
    "standalone": {
        "target": None,
        "draft": None,
        "draft_config": None,
        "init_from": None,
        "train_embedding": True,
        "loss": "kl",
        "lk_eta": 3.0,
        "label": "target",
        "gamma": 4,
        "chunk": None,
    },
}
# K of the loss `topk`, which these algorithms took before, with a fixed K.
ADDED = {name: {"topk": 10} for name in ("hydra", "medusa", "mtp", "standalone")}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_and_defaults_are_the_recorded_ones(name):
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(algorithms()[name])
    expected = {**OPTIONS[name], **ADDED.get(name, {}), **ADDED_TO_ALL, **OPTIMIZER}
    assert parser.get_defaults().as_flat().__dict__ == expected
    described = {action.dest: action.help for action in parser._actions}
    for option in expected:
        text = described[option]
        assert text
        assert text[0].isalpha() or text.startswith("``")
        assert not text.startswith("of ")


def test_no_algorithm_is_missing():
    assert set(OPTIONS) == set(algorithms())


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_declared_once_unless_its_default_changes(name):
    """A class of the tree repeats a parameter of another only with another default or another meaning."""
    seen: dict[str, object] = {}
    for cls in algorithms()[name].__mro__:
        if not cls.__module__.startswith("lightning_modules.") or "__init__" not in vars(cls):
            continue
        for option, parameter in inspect.signature(cls.__init__).parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                assert seen.get(option, ...) != parameter.default, f"{cls.__name__}: {option}"
                seen[option] = parameter.default
