"""Exported drafts in SGLang itself: every tensor reaches a parameter, and the server accepts what SpecForge says.

SGLang lives in an environment of its own, which ``--sglang-python`` names (docs/user-guide.md, section 5, says how to
make it); the kernels that it has no CPU build of are stood in for by ``tests/sglang_cpu``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_modules import algorithms
from lightning_modules.base import DraftModule
from tests.export.test_eagle_export import LATENT
from tests.lightning_modules.test_mtp import small_target, write_mtp_target
from tests.lightning_modules.test_mtp_deepseek import deepseek
from tests.sglang_cpu import environment

__all__ = ["deepseek", "small_target"]

CPU = Path(__file__).parent / "sglang_cpu"
SMALL = {"draft_vocab_size": 64}
BLOCKS = {"num_hidden_layers": 2}
SMALL_DOMINO = {"dflash_config": {"gru_hidden_dim": 16, "emb_dim": 8}}
FORMS: dict[str, tuple[str, dict[str, object]]] = {
    "eagle3": ("eagle3", SMALL),
    "eagle3.1": ("eagle3", {**SMALL, "fc_norm": True, "norm_output": True}),
    "eagle3, norm before fc": ("eagle3", {**SMALL, "norm_before_fc": True}),
    "eagle3, latent": ("eagle3", {**SMALL, **LATENT}),
    "dflash": ("dflash", BLOCKS),
    "dflash2": ("dflash2", BLOCKS),
    "domino": ("domino", {**BLOCKS, **SMALL_DOMINO}),
    "dspark": ("dspark", BLOCKS),
    "dspark, gated": ("dspark", {**BLOCKS, "markov_head_type": "gated"}),
    "dspark, rnn": ("dspark", {**BLOCKS, "markov_head_type": "rnn"}),
    "standalone": ("standalone", {"num_hidden_layers": 2}),
}

PREFIXES = {"mtp, mimo": "model.mtp_layers.0.", "mtp, deepseek": "model.layers.2."}

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


@pytest.fixture(scope="session")
def python(pytestconfig: pytest.Config) -> str:
    """The interpreter of SGLang's environment."""
    path = pytestconfig.getoption("--sglang-python")
    if not path:
        pytest.skip(
            "SGLang is elsewhere: --sglang-python names its interpreter (docs/user-guide.md, section 5)"
        )
    return str(path)


def as_if_trained(module: DraftModule) -> DraftModule:
    """No weight as it was initialised."""
    if len(module.draft.d2t) < module.target.vocab_size:
        module.draft.set_vocabulary(torch.arange(len(module.draft.d2t)) * 4)
    with torch.no_grad():
        for parameter in module.draft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def mtp_targets(small_target: Path, deepseek: Path, root: Path) -> dict[str, Path]:
    """Targets with MTP weights of their own, of each architecture that SGLang takes such weights of."""
    attention = "model.mtp_layers.0.self_attn."
    sizes = {"q": 16, "k": 8, "v": 8}
    biases = {f"{attention}{n}_proj.bias": torch.randn(size) for n, size in sizes.items()}
    write_mtp_target(small_target, root / "mimo", "mimo", biases)
    shutil.copytree(deepseek, root / "deepseek")
    for name, fields in {
        "mimo": {"model_type": "qwen2", "architectures": ["MiMoForCausalLM"]},
        "deepseek": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    }.items():
        change_config(root / name, num_nextn_predict_layers=1, **fields)
    return {f"mtp, {name}": root / name for name in ("mimo", "deepseek")}


@pytest.fixture(scope="module")
def loaded(
    python, target, small_target, deepseek, tmp_path_factory
) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """Every form's exported folder and what SGLang holds after loading it."""
    root = tmp_path_factory.mktemp("loaded")
    folders: dict[str, Path] = {}
    torch.manual_seed(0)
    modules = {}
    for name, (algorithm, config) in FORMS.items():
        options = {} if algorithm == "standalone" else {"layer_ids": [1, 3, 4]}
        modules[name] = algorithms()[algorithm](str(target), draft_config=config, **options)
    for name, folder in mtp_targets(small_target, deepseek, root).items():
        modules[name] = algorithms()["mtp"](str(folder), init_from="target_mtp")
    for name, module in modules.items():
        folders[name] = root / f"{len(folders)}"
        as_if_trained(module).export_format.to_sglang(module.draft, module.target, folders[name], "float32")
    jobs = [f"{folder}:{folder}.loaded" for folder in folders.values()]
    done = subprocess.run(
        [python, CPU / "load.py", target, *jobs],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: (folder, load_file(f"{folder}.loaded")) for name, folder in folders.items()}


def as_rows(x: Tensor) -> Tensor:
    """A view of ``[..., n]`` as ``[rows, n]``, and of a vector as single numbers."""
    return x.view(-1, x.shape[-1] if x.ndim > 1 else 1)


def place(tensor: Tensor, held: dict[str, Tensor]) -> tuple[str, int] | None:
    """The parameter and the row where a tensor's rows lie, one after another."""
    rows = as_rows(tensor)
    for name, into in ((name, as_rows(parameter)) for name, parameter in held.items()):
        if into.shape[1] != rows.shape[1]:
            continue
        for first in (into == rows[0]).all(1).nonzero().flatten().tolist():
            if torch.equal(into[first : first + len(rows)], rows):
                return name, first
    return None


@pytest.mark.parametrize("form", [*FORMS, *PREFIXES])
def test_every_tensor_reaches_a_parameter_and_no_parameter_is_left(form, loaded):
    folder, held = loaded[form]
    written = load_file(folder / "model.safetensors")
    if form in PREFIXES:
        copies = ("embed_tokens.weight", "shared_head.head.weight")  # of the target's own, as they were
        written = {
            n: x for n, x in written.items() if n.startswith(PREFIXES[form]) and not n.endswith(copies)
        }
    if "d2t" in written:
        assert torch.equal(held.pop("hot_token_id"), torch.arange(64) + written.pop("d2t"))
        written.pop("t2d")
    for name, tensor in written.items():
        found = place(tensor, held)
        assert found is not None, f"SGLang skips {name}"
        parameter, first = found
        as_rows(held[parameter])[first : first + len(as_rows(tensor))] = torch.inf
    left = {n for n, x in held.items() if not bool(torch.isinf(x).all())}
    assert left <= {"model.embed_tokens.weight", "lm_head.weight"}, "SGLang has these at random"
