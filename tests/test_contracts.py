"""Records are frozen, tensor-free and JSON; identity is content."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specforge.contracts import (
    ENCODINGS,
    CapturePolicy,
    FeatureSpec,
    PromptTask,
    Provenance,
    SampleRef,
    content_id,
    mask_spans,
)
from tests.fuzz import survives

text = st.text(max_size=8)
number = st.integers(0, 2**40)
floats = st.sampled_from(["float32", "bfloat16", "float16"])
ids = st.from_regex(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,40}", fullmatch=True)
policies = st.builds(CapturePolicy, st.lists(number, max_size=4).map(tuple), st.booleans())
provenances = st.builds(Provenance, text, text, text, policies, floats, text, st.sampled_from(ENCODINGS))


@st.composite
def refs(draw: st.DrawFn) -> SampleRef:
    tokens = draw(st.integers(0, 2**20))
    shapes = st.lists(st.integers(0, 2**12), max_size=2).map(lambda rest: (tokens, *rest))
    specs = st.builds(FeatureSpec, st.text(min_size=1, max_size=8), floats, shapes)
    features = tuple(draw(st.lists(specs, max_size=3)))
    supervised = draw(st.integers(0, tokens))
    return SampleRef(
        draw(ids),
        draw(number),
        features,
        tokens,
        supervised,
        draw(number),
        draw(text),
        draw(text),
        draw(text),
        draw(provenances),
    )


@st.composite
def tasks(draw: st.DrawFn) -> PromptTask:
    tokens = draw(st.lists(st.tuples(st.integers(-(2**31), 2**31 - 1), st.sampled_from([0, 1]))))
    return PromptTask(draw(text), tuple(x for x, _ in tokens), tuple(m for _, m in tokens), draw(text), draw(number))


@given(refs())
def test_references_survive_json(ref):
    assert SampleRef.from_json(json.loads(json.dumps(ref.to_json()))) == ref


@given(tasks())
def test_prompts_survive_json(task):
    assert PromptTask.from_json(json.loads(json.dumps(task.to_json()))) == task


@given(refs(), st.sampled_from([f.name for f in dataclasses.fields(SampleRef)]))
def test_no_tensor_crosses_the_control_plane(ref, name):
    with pytest.raises(TypeError, match="not JSON serializable"):
        dataclasses.replace(ref, **{name: torch.zeros(2)}).to_json()


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CapturePolicy((1,)).layer_ids = (2,)


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="no field 'colour'"):
        PromptTask.from_json({"task_id": "a", "input_ids": [], "loss_mask": [], "colour": 1})


POLICY = {"layer_ids": [1, 3], "last_hidden_states": True}
PROVENANCE = {
    "target": "t",
    "target_fingerprint": "f",
    "tokenizer_fingerprint": "k",
    "capture": POLICY,
    "dtype": "float32",
}
FEATURE = {"name": "x", "dtype": "float32", "shape": [3, 4]}
REF = {
    "sample_id": "s0",
    "generation": 1,
    "features": [FEATURE],
    "num_tokens": 3,
    "num_supervised": 2,
    "nbytes": 48,
    "checksum": "c",
    "uri": "u",
    "source": "s",
    "provenance": PROVENANCE,
}
TASK = {"task_id": "t", "input_ids": [1, 2], "loss_mask": [0, 1], "source": "s", "attempt": 0}
NOT = {  # what fields of a reference and of a prompt cannot be
    "sample_id": ["../x", "", "/x", ".x", "a/b", "x" * 200, None, 3],
    "generation": [-1, 1.0, True, "1", None, 10**30],
    "features": [None, {}, 3, [None], [[]], [{**FEATURE, "shape": [4, 4]}], [{"name": "x"}], [{**FEATURE, "x": 1}]],
    "num_tokens": [10**12, -3, float("nan"), 3.0, None, [3], True, 4],
    "num_supervised": [-1, 4, 0.5, None],
    "nbytes": [-1, 10**17, "48", float("inf")],
    "checksum": [None, 0],
    "uri": [None, 1, ["u"]],
    "source": [None, {}],
    "provenance": [None, [], {}, {**PROVENANCE, "dtype": "int32"}, {**PROVENANCE, "capture": None}],
    "task_id": [None, 7],
    "attempt": [-1, 0.5, None, False],
    "input_ids": [None, 5, "12", {}, [1.0, 2], [[1], 2], [2**31, 1], [None, 1], [1, 2, 3]],
    "loss_mask": [None, "01", [0, 2], [0, 256], [0], [[0], 1], [-1, 0]],
    "shape": [[], None, "34", [-1, 4], [3, 2**60], [2**40, 2**40], [3.0, 4], [[3], 4], [1] * 9],
    "name": ["", None, 1],
    "dtype": ["", "float99", "Tensor", None, 32, "nn"],
    "layer_ids": [None, 3, "1", [-1], [1.5], [[1]], [True]],
    "last_hidden_states": [None, 1, "yes"],
    "capture": [None, [], {}, {"layers": []}],
    "encoding": [None, "zip", []],
    "target_fingerprint": [None, 0],
}


@pytest.mark.parametrize(
    ("record", "good"),
    [(SampleRef, REF), (PromptTask, TASK), (FeatureSpec, FEATURE), (Provenance, PROVENANCE), (CapturePolicy, POLICY)],
)
def test_what_a_field_cannot_be_is_refused_by_name(record, good):
    assert record.from_json(good) == record.from_json(json.loads(json.dumps(record.from_json(good).to_json())))
    for name in [f.name for f in dataclasses.fields(record) if f.name in NOT]:
        for value in NOT[name]:
            with pytest.raises(ValueError, match=r"cannot be|has no field|lacks|is an object"):
                record.from_json({**good, name: value})
    for value in (None, [], "x", {}, {**good, "more": 1}):
        with pytest.raises(ValueError, match=r"has no field|lacks|is an object"):
            record.from_json(value)


def test_damaged_records_are_refused_in_one_line(fuzz):
    for value in fuzz.values([REF, {**REF, "features": [FEATURE] * 3}], 400):
        survives(lambda value=value: SampleRef.from_json(value), refusals=(ValueError,))
    for value in fuzz.values([TASK], 400):
        survives(lambda value=value: PromptTask.from_json(value), refusals=(ValueError,))


@given(st.lists(st.binary(), max_size=3), st.lists(st.binary(), max_size=3))
def test_content_ids_differ_where_contents_do(a, b):
    assert (content_id(*a) == content_id(*b)) == (a == b)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=4))
def test_spans_are_the_runs_of_each_document(documents):
    expected, offset = [], 0
    for document in documents:
        position = 0
        while position < len(document):
            stop = position
            while stop < len(document) and document[stop]:
                stop += 1
            if stop > position:
                expected.append((offset + position, offset + stop))
            position = max(stop, position + 1)
        offset += len(document)
    mask = torch.tensor([bit for document in documents for bit in document])
    assert list(mask_spans(mask, [len(d) for d in documents])) == expected
