"""The option ``engine`` of commands, recipes and the Python API, and the engine in the provenance of features."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

import specforge
from specforge.cli.main import main
from specforge.contracts import CapturePolicy, Provenance
from specforge.errors import UserError
from specforge.inference.target_engine import (
    ENGINES,
    HFTargetEngine,
    HTTPTargetEngine,
    engine_config,
    engine_path,
    engine_summary,
    on_device,
)
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_server import TargetServer, make_token
from specforge.runtime.data_plane.feature_folder import FeatureFolder
from tests.disaggregated import assert_nothing_is_left, disaggregated, places
from tests.processes import Command
from tests.test_training import assert_same_weights, fit, losses
from tests.tiny import recipe


class OtherEngine(HFTargetEngine):
    """Transformers under another name."""

    description = "other 1.0"


OTHER = f"{__name__}.OtherEngine"
CONSTANT = {"model__init_args__optimizer": {"lr": 1e-3, "schedule": "constant"}}


@pytest.fixture
def server(target, tmp_path):
    """A target server in a thread, and the words that make an engine of it."""
    files = TargetFiles.find(str(target))
    engine = HFTargetEngine(files, "float32")
    with TargetServer(engine, files, make_token(tmp_path / "token")) as running:
        threading.Thread(target=running.serve_forever, args=[0.01]).start()
        yield running
        running.shutdown()


def words(prefix: str, server: TargetServer, tmp_path: Path) -> list[str]:
    return [
        f"--{prefix}engine=http",
        f"--{prefix}engine.url={server.url}",
        f"--{prefix}engine.token_file={tmp_path / 'token'}",
    ]


def captured(target, prompts, output, *more: object) -> int:
    command = ["capture", "--target", target, "--prompts", prompts, "--output", output, "--dtype", "float32", *more]
    return main([str(word) for word in command])


def shards(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


def engines(folder: Path) -> set[str]:
    return {ref.provenance.engine for ref in FeatureFolder.open(folder / "train").refs}


# Names.


def test_every_short_name_is_a_class_of_the_module_of_that_name():
    for name, cls in ENGINES.items():
        assert engine_path(name) == engine_path(cls) == f"specforge.inference.target_engine.{cls}"
    assert engine_path("my.Engine") == "my.Engine"


def test_an_engine_is_written_down_and_named():
    engine = partial(HTTPTargetEngine, url="http://h:1", token_file=Path("t"))
    path = "specforge.inference.target_engine.http.HTTPTargetEngine"
    assert engine_config(engine) == {"class_path": path, "init_args": {"url": "http://h:1", "token_file": Path("t")}}
    assert engine_summary(engine) == "http (url http://h:1, token_file t)"
    assert engine_summary(on_device(HFTargetEngine, "cpu")) == "hf (device cpu)"
    assert on_device(engine, "auto") is engine
    with pytest.raises(UserError, match="HTTPTargetEngine does not run in this process; leave the device out"):
        on_device(engine, "cpu")
    with pytest.raises(UserError, match=r"must be a class, or functools\.partial"):
        on_device(lambda files, dtype: None, "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "vlm"], "engine vlm: use one of hf, vllm, sglang, http, or the class path of your own engine"),
        (["--engine", "http"], "engine.url: required"),
        (["--engine", "http", "--engine.urk", "x"], "unknown option 'engine.urk'; did you mean 'engine.url'?"),
        (["--engine", "vllm", "--engine.dtype", "x"], "unknown option 'engine.dtype'; did you mean 'dtype'?"),
        (["--engine", "vllm", "--engine.xyz", "1"], "'engine.xyz'; --engine.help NAME lists those of an engine"),
        (["--engine", "hf", "--engine.url", "x"], "engine.url: this engine has no such option; --engine.help NAME"),
        (["--engine", "http", "--engine.url", "http://h:1", "--device", "cpu"], "does not run in this process"),
        (["--engine.device", "gpu"], "device 'gpu': use auto, cpu, cuda or cuda:N"),
        (["--engine", "no.such.Engine"], "engine: no.such.Engine cannot be imported (No module named 'no')"),
        (["--engine", "specforge.inference.target_files.TargetFiles"], "TargetFiles is not a TargetEngine"),
    ],
)
def test_a_wrong_engine_is_one_line(target, prompts, tmp_path, capsys, options, message):
    assert captured(target, prompts, tmp_path / "f", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "f").exists()


# The same features, however the engine is given.


@pytest.mark.parametrize("form", ["words", "yaml", "yaml short", "environment"])
def test_capture_by_a_server(target, prompts, features, tmp_path, server, monkeypatch, form):
    options = {"url": server.url, "token_file": str(tmp_path / "token")}
    more: list[object] = []
    if form == "words":
        more = words("", server, tmp_path)
    elif form == "environment":
        for name, value in {"": "http", "__URL": server.url, "__TOKEN_FILE": options["token_file"]}.items():
            monkeypatch.setenv(f"SPECFORGE_CAPTURE_ENGINE{name}", value)
    else:
        value = {"class_path": "http", "init_args": options} if form == "yaml" else "http"
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"engine": value}))
        more = ["--config", tmp_path / "c.yaml"]
        if form == "yaml short":
            more += [f"--engine.{name}={value}" for name, value in options.items()]
    assert captured(target, prompts, tmp_path / "f", "--batch_tokens", 2048, *more) == 0
    assert shards(tmp_path / "f") == shards(features)
    assert engines(tmp_path / "f") == {""}


def test_capture_from_python(target, prompts, features, tmp_path):
    options = specforge.CaptureOptions(dtype="float32", engine=partial(HFTargetEngine, device="cpu"))
    specforge.capture(target, prompts, tmp_path / "f", options)
    assert shards(tmp_path / "f") == shards(features)


def test_fit_by_a_server_records_the_engine_and_resumes(target, prompts, tmp_path, server):
    """By the shorthand, by the engine, and by what ``config.yaml`` of the run holds."""
    init = {"prompts": str(prompts), "batch_size": 4, "dtype": "float32"}
    data = {"class_path": "OnlineDataModule", "init_args": init}
    token = str(tmp_path / "token")
    short = fit(
        recipe(target, prompts, tmp_path / "a", data=data, **CONSTANT),
        "--data.server",
        server.url,
        "--data.token_file",
        token,
    )
    path = recipe(target, prompts, tmp_path / "b", data=data, **CONSTANT)
    fit(path, *words("data.", server, tmp_path), "--trainer.max_steps", 3)
    written = yaml.safe_load((tmp_path / "b" / "run" / "config.yaml").read_text())
    engine = written["data"]["init_args"]["engine"]
    assert engine["class_path"] == "specforge.inference.target_engine.HTTPTargetEngine"
    assert engine["init_args"]["url"] == server.url
    saved = torch.load(tmp_path / "b" / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert "HTTPTargetEngine" not in str({key: x for key, x in saved.items() if key != "state_dict"})
    run = fit(tmp_path / "b" / "run" / "config.yaml", "--trainer.max_steps", 6, "--ckpt_path", "last")
    assert losses(run) == losses(short)
    assert_same_weights(run, short)


def test_the_processes_of_produce_get_the_engine(target, prompts, tmp_path, server):
    where = places(tmp_path)
    path = disaggregated(target, prompts, tmp_path, where, {"trainer__max_steps": 2})
    producing = [f"--{name}={value}" for name, value in where.items()]
    produce = Command(
        "produce", f"--target={target}", *producing, *words("", server, tmp_path), "--workers=2", "--idle_seconds=2"
    )
    fit(path)
    output, _ = produce.communicate(timeout=180)
    assert produce.returncode == 0, output
    assert_nothing_is_left(where, trained=2 * 4)


# Provenance.


def test_an_engine_without_a_name_is_written_as_before():
    old = Provenance("t", "f", "k", CapturePolicy((1,)), "float32")
    assert "engine" not in old.to_json()
    assert Provenance.from_json(json.loads(json.dumps(old.to_json()))) == old
    new = Provenance("t", "f", "k", CapturePolicy((1,)), "float32", engine="vllm 1")
    assert Provenance.from_json(new.to_json()) == new
    assert new.feature_key != old.feature_key
    with pytest.raises(ValueError, match="engine cannot be 3"):
        Provenance.from_json({**old.to_json(), "engine": 3})


def test_a_folder_of_one_engine_takes_no_features_of_another_unless_asked(target, prompts, features, tmp_path, capsys):
    folder = tmp_path / "f"
    assert captured(target, prompts, folder, "--limit_samples", 3) == 0
    before = shards(folder)
    capsys.readouterr()
    assert captured(target, prompts, folder, "--engine", OTHER) == 2
    message = "holds features computed by transformers, not other 1.0, which differ in their last bits; choose another"
    assert message in capsys.readouterr().err
    assert shards(folder) == before
    assert captured(target, prompts, folder, "--engine", OTHER, "--mix_engines", "true") == 0
    assert engines(folder) == {"", "other 1.0"}
    shutil.rmtree(folder)
    assert captured(target, prompts, folder, "--engine", OTHER) == 0
    assert engines(folder) == {"other 1.0"}
    assert captured(target, prompts, folder) == 2
    assert "holds features computed by other 1.0, not transformers" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_another_engine_unless_asked(target, prompts, tmp_path, capsys):
    data = {"prompts": str(prompts), "batch_size": 4, "dtype": "float32"}
    path = recipe(target, prompts, tmp_path, data={"class_path": "OnlineDataModule", "init_args": data})
    fit(path, "--trainer.max_steps", 2)
    resumed = ["fit", "--config", str(path), "--ckpt_path", "last", "--data.engine", OTHER]
    assert main(resumed) == 2
    assert "engine (transformers, now other 1.0) changed since the checkpoint" in capsys.readouterr().err
    assert main([*resumed, "--data.mix_engines", "true"]) == 0


@pytest.mark.parametrize("command", ["serve", "capture", "produce", "fit"])
def test_nothing_is_begun_if_another_process_has_the_port_of_the_engine(
    command, target, prompts, tmp_path, monkeypatch, capsys
):
    """It may even be another healthy server."""
    monkeypatch.chdir(tmp_path)
    data = {"class_path": "OnlineDataModule", "init_args": {"prompts": str(prompts), "batch_size": 2}}
    path = recipe(target, prompts, tmp_path, data=data)
    before = sorted(tmp_path.rglob("*"))
    words = {
        "serve": ["target", "serve", "--target", target, "--port", 0],
        "capture": ["capture", "--target", target, "--prompts", prompts, "--output", "features"],
        "produce": ["produce", "--target", target, "--store", "queue", "--metadata", "metadata.db"],
        "fit": ["fit", "--config", path],
    }[command]
    prefix = "--data.engine" if command == "fit" else "--engine"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        engine = [prefix, "vllm", f"{prefix}.store", "store", f"{prefix}.arguments", f'["--port", "{port}"]']
        assert main([*map(str, words), *engine]) == 2
    assert f"127.0.0.1:{port}: cannot listen there" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--engine=http", "--engine.url=http://127.0.0.1:1"],
            "so only --engine hf works, not http (url http://127.0.0.1:1",
        ),
        (["--engine.device_map=auto"], "evaluate: needs the target on one device; leave --engine.device_map out"),
    ],
)
def test_evaluate_decodes_against_transformers_on_one_device(
    target, prompts, features, tmp_path, capsys, options, message
):
    run = fit(recipe(target, features, tmp_path), "--trainer.max_steps", 1)
    words = ["--prompts", prompts, "--num_prompts", 2, "--max_new_tokens", 4, "--speed_prompts", 0, "--cache", tmp_path]
    command = [
        str(word) for word in ("evaluate", "--draft", run / "checkpoints" / "last.ckpt", *words, "--dtype", "auto")
    ]
    capsys.readouterr()
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err
    assert main([*command, "--engine.attention", "eager"]) == 0
    assert "ngram: decoding 2 prompts in float32" in capsys.readouterr().out
