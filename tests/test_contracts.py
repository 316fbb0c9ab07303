"""Records are frozen, tensor-free and JSON; identity is content."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specforge.contracts import (
    CapturePolicy,
    FeatureSpec,
    PromptTask,
    Provenance,
    SampleRef,
    content_id,
    mask_spans,
)

text = st.text(max_size=8)
number = st.integers(0, 2**40)
policies = st.builds(CapturePolicy, st.lists(number, max_size=4).map(tuple), st.booleans())
provenances = st.builds(Provenance, text, text, text, policies, text, text)
specs = st.builds(FeatureSpec, text, text, st.lists(number, max_size=3).map(tuple))
refs = st.builds(
    SampleRef,
    text,
    number,
    st.lists(specs, max_size=3).map(tuple),
    number,
    number,
    number,
    text,
    text,
    text,
    provenances,
)
tasks = st.builds(
    PromptTask, text, st.lists(number).map(tuple), st.lists(st.sampled_from([0, 1])).map(tuple), text, number
)


@given(refs)
def test_references_survive_json(ref):
    assert SampleRef.from_json(json.loads(json.dumps(ref.to_json()))) == ref


@given(tasks)
def test_prompts_survive_json(task):
    assert PromptTask.from_json(json.loads(json.dumps(task.to_json()))) == task


@given(refs, st.sampled_from([f.name for f in dataclasses.fields(SampleRef)]))
def test_no_tensor_crosses_the_control_plane(ref, name):
    with pytest.raises(TypeError, match="not JSON serializable"):
        dataclasses.replace(ref, **{name: torch.zeros(2)}).to_json()


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CapturePolicy((1,)).layer_ids = (2,)


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="no field 'colour'"):
        PromptTask.from_json({"task_id": "a", "input_ids": [], "loss_mask": [], "colour": 1})


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
