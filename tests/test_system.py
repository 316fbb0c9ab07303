"""The dtype of matrix products, by what a CPU can multiply."""

from __future__ import annotations

import pytest
import torch

from specforge.system import multiplies_in


@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_a_cpu_without_instructions_for_a_dtype_multiplies_in_fp32(dtype, kind, monkeypatch):
    name = f"_is_mkldnn_{kind}_supported"
    assert callable(getattr(torch.ops.mkldnn, name))  # PyTorch still has it under this name
    for supported, expected in ((True, dtype), (False, torch.float32)):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda found=supported: found)
        assert multiplies_in(dtype, "cpu") == expected
        assert multiplies_in(dtype, torch.device("cuda", 1)) == dtype
        assert multiplies_in(torch.float64, "cpu") == torch.float64
    monkeypatch.setattr(torch.ops, "mkldnn", object())  # a build without oneDNN
    assert multiplies_in(dtype, "cpu") == torch.float32
