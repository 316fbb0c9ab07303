"""A server's figures: each against a slow computation of its own, from scripted answers."""

from __future__ import annotations

import json
import math
import re
import signal
import socket
import threading
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from specforge.cli.main import main
from specforge.data.templates import ChatTemplate
from specforge.errors import UserError
from specforge.eval.bench import Acceptance, Bench, BenchOptions, Case, Comparison, Level, Speed, Spread, at_length
from specforge.eval.bench_report import _draw_tau, tables
from specforge.eval.held_out import read_prompts
from specforge.eval.served import Answer, find_server
from specforge.eval.tau import Rounds
from specforge.inference.server_client import ServerClient
from specforge.inference.target_files import TargetFiles
from tests.eval.fake_server import Fake, serving

PROMPTS = (0, 1, 2, 0, 1, 2)  # each prompt twice


def answers(seed: int) -> list[Answer]:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(len(PROMPTS)):
        tokens = int(rng.integers(5, 30))
        first = float(rng.uniform(0.01, 0.1))
        seconds = first + float(rng.uniform(0.1, 1))
        rounds = int(rng.integers(tokens // 3, tokens))
        made.append(Answer(list(range(tokens)), [], 100.0 + number, first, seconds, rounds))
    return made


def test_percentiles_interpolate_between_neighbours():
    values = [3.0, 1.0, 2.0, 10.0, 4.0]

    def slow(share: float) -> float:
        ordered, place = sorted(values), share * (len(values) - 1)
        low = math.floor(place)
        return ordered[low] + (place - low) * (ordered[min(low + 1, len(values) - 1)] - ordered[low])

    spread = Spread.of(values)
    assert (spread.p50, spread.p90, spread.p99) == pytest.approx([1e3 * slow(x) for x in (0.5, 0.9, 0.99)])


def test_speed_is_over_the_time_in_which_requests_were_open():
    made = answers(0)
    speed = Speed.of(made)
    end = max(a.started + a.seconds for a in made)
    assert (speed.requests, speed.tokens) == (6, sum(len(a.tokens) for a in made))
    assert speed.tokens_per_second == pytest.approx(speed.tokens / (end - 100.0))
    per_token = sorted((a.seconds - a.first) / (len(a.tokens) - 1) * 1e3 for a in made)
    assert speed.per_token.p50 == pytest.approx((per_token[2] + per_token[3]) / 2)


def test_tau_is_pooled_and_its_interval_clustered_by_prompt():
    from scipy.stats import t

    made = answers(1)
    found = Acceptance.of(PROMPTS, made, None)
    assert found is not None
    sums = [
        [
            sum(x)
            for x in zip(
                *((len(a.tokens) - 1, a.rounds) for a, p in zip(made, PROMPTS, strict=True) if p == prompt), strict=True
            )
        ]
        for prompt in range(3)
    ]
    assert found.per_prompt == [Rounds(*pair) for pair in sums]
    tokens, rounds = map(sum, zip(*sums, strict=True))
    tau = tokens / rounds
    variance = sum((n - tau * r) ** 2 for n, r in sums) / (3 * 2)
    half = t.ppf(0.975, 2) * variance**0.5 / (rounds / 3)
    assert (found.rounds, found.tau) == (rounds, pytest.approx(tau))
    assert found.tau_ci95 == pytest.approx([max(1.0, tau - half), tau + half])


def test_a_counter_of_all_requests_gives_tau_without_interval():
    made = answers(1)
    made[2].rounds = None
    tokens = sum(len(a.tokens) - 1 for a in made)
    assert Acceptance.of(PROMPTS, made, 50) == Acceptance(50, tokens / 50)
    assert Acceptance.of(PROMPTS, made, None) is None
    assert Acceptance.of(PROMPTS, made, 0) is None


def test_an_answer_of_one_token_has_no_round():
    one = Answer([7], [1], 0.0, 0.1, 0.1, None)
    assert Acceptance.of((0, 1), [one, *answers(1)[:1]], None) is not None
    assert Acceptance.of((0,), [one], None) is None


def test_speed_up_is_the_ratio_of_the_speeds_of_requests():
    made, others = answers(2), answers(3)
    found = Comparison.of(PROMPTS, made, others, greedy=True)
    ratio = (sum(len(a.tokens) for a in made) / sum(a.seconds for a in made)) / (
        sum(len(a.tokens) for a in others) / sum(a.seconds for a in others)
    )
    assert found.speedup == pytest.approx(ratio)
    low, high = found.speedup_ci95 or (0, 0)
    assert low < ratio < high
    assert found.identical == sum(len(a.tokens) == len(b.tokens) for a, b in zip(made, others, strict=True))
    assert Comparison.of(PROMPTS, made, others, greedy=False).identical is None


@pytest.mark.parametrize("length", [1, 3, 6])
def test_prompts_are_brought_to_one_length_and_end_as_they_did(length):
    made = at_length([[1, 2], [3], [4, 5, 6]], length)
    text = [1, 2, 3, 4, 5, 6]
    ends = (2, 3, 6)
    assert made == [[text[(end - length + i) % 6] for i in range(length)] for end in ends]


def test_all_prompts_bring_the_first_ones_to_their_length():
    assert at_length([[1, 2], [3], [4, 5, 6]], 6, 1) == [[3, 4, 5, 6, 1, 2]]


def test_a_length_beyond_all_prompts_is_refused():
    with pytest.raises(UserError, match="--lengths 7: all prompts together have 6 tokens"):
        at_length([[1, 2], [3], [4, 5, 6]], 7)


def script(prompt):
    return [*prompt[:3], 5, 6, 7, 8], [2, 0, 1 + len(prompt) % 3]


def run(fake: Fake, baseline: Fake | None, **options):
    servers = [None if f is None else find_server(ServerClient(f.url, patience=0)) for f in (fake, baseline)]
    bench = Bench(*servers, [8], BenchOptions(max_new_tokens=7, **options), "salt")
    return list(bench.run({"a": [[1, 2, 3], [2, 3, 4, 5]], "b": [[9, 9, 9, 9]]}))


def test_every_case_is_measured_and_no_request_profits_from_an_earlier_one():
    with serving(script) as fake:
        levels = run(fake, None, concurrency=[1, 3], temperature=[0.0, 1.0], lengths=[4])
        assert [level.case for level in levels] == [
            Case(name, 4, temperature, load) for name, temperature, load in product("ab", (0.0, 1.0), (1, 3))
        ]
        measured = [body for body in fake.asked if body["max_tokens"] == 7 and body["cache_salt"] != "warm-up"]
    assert [level.speed.requests for level in levels] == [2, 6, 2, 6, 2, 6, 2, 6]
    keys = [(body["cache_salt"], *body["prompt"]) for body in measured]
    assert len(set(keys)) == len(keys) == 32
    assert [body["temperature"] for body in measured] == [0.0] * 8 + [1.0] * 8 + [0.0] * 8 + [1.0] * 8


def test_a_draft_is_compared_with_the_baseline():
    other = lambda prompt: (script(prompt)[0] if prompt[0] == 1 else [9, 9, 9], None)  # noqa: E731
    with serving(script) as fake, serving(other) as baseline:
        level, *_ = run(fake, baseline, concurrency=[1], temperature=[0.0])
    assert level.comparison is not None
    assert level.comparison.identical == 1
    assert level.comparison.baseline.tokens == 7 + 3
    assert level.acceptance is not None
    assert level.acceptance.per_prompt == [Rounds(6, 3), Rounds(6, 3)]


def test_vllm_without_counters_per_request_is_measured_by_its_counter_of_all():
    with serving(script, per_request=False) as fake:
        (level, _) = run(fake, None, concurrency=[1], temperature=[0.0])
    assert level.acceptance == Acceptance(6, 2.0)


def test_conversations_and_prompt_sets_give_the_same_prompts(target, prompts, conversations, tmp_path):
    template = ChatTemplate.load(TargetFiles.find(str(target)))
    rows = [json.loads(line) for line in conversations.read_text().splitlines()]
    held_out = [row for row in rows if row.get("split") == "heldout"]
    asked = tmp_path / "asked.jsonl"  # without answers
    for row in held_out:
        answer = next(i for i, m in enumerate(row["messages"]) if m["role"] == "assistant")
        row["messages"] = row["messages"][:answer]
    asked.write_text("".join(json.dumps(row) + "\n" for row in held_out))
    expected = read_prompts(prompts, template)
    assert sorted(read_prompts(asked, template)) == sorted(expected)
    assert len(expected) == len(held_out) == 8


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"messages": []}', "line 1"),
        ('{"input_ids": [1, 2], "loss_mask": [1, 1]}', "has no prompts"),
        ("{", "line 1"),
        ("", "has no prompts"),
    ],
)
def test_files_without_prompts_are_one_line(target, tmp_path, content, reason):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=reason):
        read_prompts(path, ChatTemplate.load(TargetFiles.find(str(target))))


def test_the_command_writes_json_a_page_and_plots(target, prompts, tmp_path, capsys):
    def answer(prompt):
        return [prompt[0], prompt[0], 7, 8, 9], [1, 1]

    with serving(answer, folder=str(target)) as fake, serving(answer, folder=str(target)) as baseline:
        words = ["bench", fake.url, "--baseline", baseline.url, "--prompts", prompts, "--output", tmp_path / "out"]
        assert main([str(w) for w in [*words, "--concurrency", 1, 2, "--temperature", 0, "--lengths", 30]]) == 0
    shown = capsys.readouterr().out
    assert "8/8" in shown
    assert "2.00" in shown
    content = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert content["run"]["server"] == f"vllm 1.2 at {fake.url}"
    first = content["levels"][0]
    assert first["case"] == {"prompts": str(prompts), "length": 30, "temperature": 0.0, "concurrency": 1}
    assert first["acceptance"]["per_prompt"] == [{"tokens": 4, "rounds": 2, "tau": 2.0}] * 8
    page = (tmp_path / "out" / "bench.html").read_text()
    assert page.count("<img") == len(list((tmp_path / "out" / "plots").glob("*.png"))) == 6
    assert "8/8" in page


def test_lengths_at_one_load_are_rows_of_one_table_and_the_axis_of_the_plots():
    levels = [
        Level(Case("a", length, temperature, 2), Speed.of(answers(0)), Acceptance.of(PROMPTS, answers(0), None))
        for length in (8, 64)
        for temperature in (0.0, 1.0)
    ]
    greedy, sampled = tables(levels)
    assert [greedy["title"], sampled["title"]] == ["a, temperature 0", "a, temperature 1"]
    assert [row[:2] for row in greedy["rows"]] == [("8", "2"), ("64", "2")] == [row[:2] for row in sampled["rows"]]
    assert (greedy["columns"][:2], greedy["notes"]) == (("prompt", "load"), [])
    assert len(sampled["notes"]) == 1
    axes = Figure().add_subplot()
    assert _draw_tau(axes, levels)
    assert [(line.get_label(), [*line.get_xdata()]) for line in axes.lines] == [
        ("temperature 0", [8, 64]),
        ("temperature 1", [8, 64]),
    ]


def test_prompts_longer_than_a_server_reads_are_refused_before_anything_is_asked():
    with serving(script, max_model_len=10) as fake:
        with pytest.raises(UserError, match=r"at most 10 tokens; the longest prompt and --max_new_tokens are 4 \+ 7$"):
            run(fake, None)
        assert not fake.asked


@pytest.mark.parametrize("ending", ["broken off", "SIGTERM"])
def test_what_is_measured_before_a_bench_ends_early_is_kept(ending, target, prompts, tmp_path, capsys):
    requests, kept = 0, []

    def answer(prompt):
        nonlocal requests
        requests += 1  # a level is a warm-up and eight answers
        if requests == 10:
            kept.append(json.loads((tmp_path / "out" / "bench.json").read_text()))
            if ending == "SIGTERM":
                signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        return ([7, 8, 9], [2]) if requests <= 9 else ([], [])

    with serving(answer, folder=str(target)) as fake:
        words = ["bench", fake.url, "--prompts", str(prompts), "--output", str(tmp_path / "out")]
        assert main([*words, "--concurrency", "1", "2", "--temperature", "0"]) == (130 if ending == "SIGTERM" else 2)
    shown = capsys.readouterr()
    assert ("interrupted" if ending == "SIGTERM" else "an answer has no tokens") in shown.err
    assert f"{tmp_path / 'out' / 'bench.html'}: 1 of 2 measurements" in shown.out.replace("\n", "")
    assert kept == [json.loads((tmp_path / "out" / "bench.json").read_text())]
    (level,) = kept[0]["levels"]
    assert level["case"]["concurrency"] == 1


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("command", ["bench", "parity"])
def test_files_are_checked_before_the_server_is_asked(command, named, target, prompts, tmp_path, capsys):
    """It may be down, which is waited for."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        more = ["--target", str(target)] if named else []
        missing = [("--prompts", prompts / "x")] if command == "bench" else [("--prompts", prompts), ("--draft", "x")]
        words = [str(word) for pair in missing for word in pair]
        begun = time.monotonic()
        assert main([command, f"http://127.0.0.1:{unused.getsockname()[1]}", *words, *more]) == 2
    assert re.search("prompts .*x: no such file or folder|^specforge: x: ", capsys.readouterr().err)
    assert time.monotonic() - begun < 25


def test_a_target_elsewhere_must_be_named(prompts, tmp_path, capsys):
    with serving(script) as fake:
        assert main(["bench", fake.url, "--prompts", str(prompts), "--output", str(tmp_path / "out")]) == 2
    assert "its model /nowhere is not a folder here; name the target with --target" in capsys.readouterr().err
    assert not Path(tmp_path / "out").exists()
