"""Servers that run another draft than the one that was trained: the fault is named, from rounds alone."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_modules import algorithms
from lightning_modules.base import DraftModule
from specforge.cli.main import main
from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, CapturePolicy
from specforge.decoding.decoder import decode
from specforge.errors import UserError
from specforge.eval.cache import Reference
from specforge.eval.offline import replay
from specforge.eval.parity import Parity, describe
from specforge.eval.served import find_server
from specforge.inference.server_client import ServerClient
from specforge.inference.target_engine import HFTargetEngine
from tests.eval.fake_server import Fake, serving
from tests.lightning_modules.test_mtp_deepseek import memorise

GAMMA, TOKENS, END = 3, 14, 256
PROMPTS, KNOWN = 3, 2


class Trained:
    """A draft that knows the target's answers to all prompts but one."""

    def __init__(self, target: Path, algorithm: str, **options: Any) -> None:
        torch.manual_seed(0)
        self.module: DraftModule = algorithms()[algorithm](str(target), **options)
        size = len(self.module.draft.d2t)
        if size < 264:
            self.module.draft.set_vocabulary(torch.randperm(264)[:size].sort().values)
        self.engine = HFTargetEngine(self.module.target, "float32")
        self.prompts = torch.randint(0, 256, (PROMPTS, 9)).tolist()
        answers = self.engine.generate(self.prompts, max_new_tokens=TOKENS, end_ids=[END])
        memorise(self.module, self.engine, [[*p, *a] for p, a in zip(self.prompts[:KNOWN], answers, strict=False)])
        self.module.eval()
        self.head = self.module.target_head(torch.device("cpu"))

    def script(self, change: Callable[[Any], None] = lambda drafter: None) -> Callable[..., Any]:
        """What a server says that decodes with a changed drafter."""

        def answer(prompt: Sequence[int]) -> tuple[list[int], list[int]]:
            drafter = self.module.drafter(self.head, torch.float32)
            change(drafter)
            steps: list[int] = []
            observe = drafter.observe

            def counting(tokens: Sequence[int], features: Any) -> None:
                steps.append(len(tokens))
                observe(tokens, features)

            drafter.observe = counting
            (decoded,) = decode(
                self.engine.model, lambda: drafter, [prompt], gamma=GAMMA, max_new_tokens=TOKENS, end_ids=[END]
            )
            return decoded.tokens, [n - 1 for n in steps[1:]]

        return answer

    def check(self, fake: Fake, **options: Any) -> Any:
        server = find_server(ServerClient(fake.url, patience=0))
        return Parity(server, self.module, [END], TOKENS, "float32", "cpu", **options).run(self.prompts)


@pytest.fixture(scope="module")
def eagle(target: Path) -> Trained:
    config = {"draft_vocab_size": 200, "fc_norm": True, "norm_output": True, "rope_theta": 10.0}
    return Trained(target, "eagle3", layer_ids=[2, 4, 5], init_from="target", draft_config=config)


@pytest.fixture(scope="module")
def medusa(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Its target's final norm has weights far from 1."""
    folder = tmp_path_factory.mktemp("medusa") / "target"
    shutil.copytree(target, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.randn(32, generator=torch.Generator().manual_seed(0))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Trained(folder, "medusa")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_server_that_agrees_is_one_line(eagle, engine):
    with serving(eagle.script(), engine=engine) as fake:
        result = eagle.check(fake)
    assert (result.agrees, result.trials) == (True, [])
    (line,) = describe(result, "the server", "eagle3")
    rounds = sum(p.rounds for p in result.prompts)
    assert f"{rounds} rounds" in line
    assert "agree on 3/3 prompts" in line
    assert rounds < 0.9 * sum(p.tokens - 1 for p in result.prompts)  # something is accepted


def layers(*ids: int) -> Callable[[Any], None]:
    return lambda drafter: setattr(drafter, "capture", CapturePolicy(ids, last_hidden_states=False))


def moved(late: int) -> Callable[[Any], None]:
    """Each token with the features of the one before it, or after it as far as they are known."""

    def change(drafter: Any) -> None:
        observe, last = drafter.observe, []

        def shifted(tokens: Sequence[int], features: Any) -> None:
            x = features[AUX_HIDDEN_STATES]
            last.append(x)
            before = last[-2][-1:] if len(last) > 1 else x[:1]
            observe(tokens, {AUX_HIDDEN_STATES: torch.cat([before, x[:-1]])})

        drafter.observe = shifted

    assert late == 1
    return change


def network(**attributes: Any) -> Callable[[Any], None]:
    """Attributes of the network for this decoder alone."""

    def change(drafter: Any) -> None:
        draft = drafter.decoder.draft
        drafter.decoder.draft = type("Changed", (), {name: getattr(draft, name) for name in ("norm", "fuse")})()
        drafter.decoder.draft.midlayer, drafter.decoder.draft.norm_output = draft.midlayer, draft.norm_output
        for name, value in attributes.items():
            setattr(drafter.decoder.draft, name, value)

    return change


def ids(of: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    return lambda drafter: setattr(drafter, "target_ids", of(drafter.target_ids))


def index(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(x))


FAULTS = {
    "layer ids one too low: [1, 3, 4], not [2, 4, 5]": layers(1, 3, 4),
    "layer ids one too high: [3, 5, 6], not [2, 4, 5]": layers(3, 5, 6),
    "features one token late": moved(1),
    "vocabulary map (d2t) ignored": ids(index),
    "vocabulary map (d2t) read as target ids": ids(lambda x: x - index(x)),
    "norm_output False": network(norm_output=False),
}


# SGLang does not list its rounds; as many messages as rounds do.
@pytest.mark.parametrize(("engine", "fault"), [*(("vllm", fault) for fault in FAULTS), ("sglang", next(iter(FAULTS)))])
def test_a_fault_is_named(eagle, fault, engine):
    with serving(eagle.script(FAULTS[fault]), engine=engine) as fake:
        result = eagle.check(fake)
    assert not result.agrees
    assert fault in [trial.fault for trial in result.causes]
    assert result.causes[0].agree == result.tried_on == PROMPTS
    last = list(describe(result, "the server", "eagle3"))[-1]
    assert fault in last
    assert "reproduces the server's rounds on all 3 prompts" in last


def test_the_first_round_that_differs_is_named(eagle):
    right, wrong = eagle.script(), eagle.script(layers(1, 3, 4))
    with serving(wrong) as fake:
        result = eagle.check(fake)
    number = next(i for i, p in enumerate(result.prompts) if p.parts_at is not None)
    steps = [[n + 1 for n in script(eagle.prompts[number])[1]] for script in (wrong, right)]
    first = next(i for i, (a, b) in enumerate(zip(*steps, strict=False)) if a != b)
    found = result.prompts[number]
    assert (found.parts_at, found.server_step, found.step) == (
        1 + sum(steps[0][:first]),
        steps[0][first],
        steps[1][first],
    )


def test_a_state_before_the_final_norm_is_named(medusa):
    last = medusa.module.target.num_layers - 1

    def change(drafter: Any) -> None:
        drafter.capture, drafter._feature = CapturePolicy((last,), last_hidden_states=False), AUX_HIDDEN_STATES

    with serving(medusa.script(change)) as fake:
        result = medusa.check(fake)
    assert [trial.fault for trial in result.causes] == ["the final norm of the target left out"]


def test_a_draft_without_its_weights_is_named(eagle):
    def script(prompt: Sequence[int]) -> tuple[list[int], list[int]]:
        tokens, _ = eagle.script()(prompt)
        return tokens, [0] * (len(tokens) - 1)

    with serving(script) as fake:
        result = eagle.check(fake)
    assert "no drafted token is right: missing or random weights" in [trial.fault for trial in result.causes]


def changed(eagle: Trained, *changes: tuple[Any, str, Any]) -> dict[tuple[int, ...], Any]:
    """What a server says whose draft has other attributes."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, value in changes:
            patch.setattr(owner, name, value)
        return {tuple(prompt): eagle.script()(prompt) for prompt in eagle.prompts}


def test_weights_of_less_precision_are_named(eagle, monkeypatch):
    """All rows of the head share a large number: that changes no answer, but a rounded row holds little else."""
    monkeypatch.setattr(eagle.module.draft.lm_head.weight, "data", eagle.module.draft.lm_head.weight.data + 64.0)
    rounded = [(x, "data", x.data.bfloat16().float()) for x in eagle.module.draft.parameters()]
    answers = changed(eagle, *rounded)
    with serving(lambda prompt: answers[tuple(prompt)]) as fake:
        result = eagle.check(fake)
    assert not result.agrees
    assert result.causes[0].fault.startswith("the draft's weights rounded to bfloat16")


@pytest.mark.parametrize("fault", ["RoPE with the default theta, 10000", "norm_before_residual True"])
def test_a_network_of_another_config_is_named(eagle, fault):
    draft = eagle.module.draft
    config = copy.copy(draft.config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    change = (draft.midlayer, "norm_before_residual", True)
    answers = changed(eagle, (draft, "rotary", type(draft.rotary)(config)) if "RoPE" in fault else change)
    with serving(lambda prompt: answers[tuple(prompt)]) as fake:
        result = eagle.check(fake)
    assert not result.agrees
    assert fault in [trial.fault for trial in result.causes]


def test_an_answer_that_is_not_the_targets_is_named(eagle):
    def script(prompt: Sequence[int]) -> tuple[list[int], list[int]]:
        tokens, _ = eagle.script()(prompt)
        tokens[5] = (tokens[5] + 1) % 256
        return tokens, [0] * (len(tokens) - 1)

    with serving(script) as fake:
        result = eagle.check(fake)
    assert {p.unlikely_at for p in result.prompts} == {5}
    assert any("first at token 5 of the answer to prompt 0" in line for line in describe(result, "s", "eagle3"))


def test_trying_faults_leaves_the_module_as_it_was(eagle):
    before = {name: x.clone() for name, x in eagle.module.draft.state_dict().items()}
    with serving(eagle.script(layers(1, 3, 4))) as fake:
        eagle.check(fake)
    with serving(eagle.script()) as fake:
        assert eagle.check(fake).agrees
    assert all(torch.equal(x, before[name]) for name, x in eagle.module.draft.state_dict().items())


@pytest.mark.parametrize("name", ["eagle", "medusa"])
def test_a_replay_has_the_rounds_of_decoding(name, request):
    trained = request.getfixturevalue(name)
    for prompt in trained.prompts:
        tokens, accepted = trained.script()(prompt)
        drafter = trained.module.drafter(trained.head, torch.float32)
        (features,) = trained.engine.capture([[*prompt, *tokens]], trained.module.spec.capture)
        assert {AUX_HIDDEN_STATES, LAST_HIDDEN_STATES} & set(features)
        steps = replay(drafter, Reference(prompt, tokens, features), GAMMA)
        assert len(steps) == len(accepted)
        assert steps[:-1] == [n + 1 for n in accepted[:-1]]


@pytest.mark.parametrize(
    ("options", "reason"), [({"per_request": False}, "reports no rounds for a request"), ({}, "start it with a draft")]
)
def test_a_server_that_counts_no_rounds_is_refused(eagle, options, reason):
    script = eagle.script() if options else (lambda prompt: ([1, 2, 3], None))
    with serving(script, **options) as fake, pytest.raises(UserError, match=reason):
        eagle.check(fake)


def test_the_command_reports_and_exits_with_1(eagle, target, tmp_path, capsys):
    folder, questions, found = tmp_path / "draft", tmp_path / "prompts.jsonl", tmp_path / "parity.json"
    eagle.module.export_format.to_sglang(eagle.module.draft, eagle.module.target, folder, "float32")
    rows = [{"input_ids": [*p, 1], "loss_mask": [0] * len(p) + [1]} for p in eagle.prompts]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--draft", folder, "--prompts", questions, "--max_new_tokens", TOKENS, "--json", found]
    for script, status in ((eagle.script(), 0), (eagle.script(layers(1, 3, 4)), 1)):
        with serving(script, folder=str(target)) as fake:
            assert main(["parity", fake.url, *map(str, words)]) == status
    shown = capsys.readouterr().out
    assert "agree on 3/3 prompts" in shown
    assert "likely cause: layer ids one too low: [1, 3, 4], not [2, 4, 5]" in shown
    assert json.loads(found.read_text())["causes"][0].startswith("layer ids one too low")
