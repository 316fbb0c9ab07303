"""Products in fp8: their errors against fp64, where training uses them, and that they change nothing else.

On a CPU, the kernel is replaced by its definition and a check of what it takes (not all versions and processors have
one); on a GPU, these tests show whether the real kernel takes it and gives the same.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lightning_modules.base
from lightning_modules import algorithms
from specforge.cli.main import main
from specforge.errors import UserError
from specforge.inference.target_head import TargetHead
from specforge.modeling.layers import fp8
from specforge.modeling.layers.decoder_layer import RMSNorm
from specforge.modeling.layers.fp8 import Fp8Matrix, as_matrix, cast_rows, check_fp8, linear
from tests.lightning_modules.test_ragged import FORMS, LAYERS, H, V, document, make_module, pack
from tests.test_fusion import compile_with
from tests.test_training import fit, losses
from tests.tiny import TINY_OPTIONS, recipe, write_target

HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
LATENT = {**dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16)}
LATENT |= {"architectures": ["Eagle3DeepseekV2ForCausalLM"], "num_key_value_heads": 4}


def kernel(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, use_fast_accum: bool
) -> Tensor:
    """What ``torch._scaled_mm`` is to compute with row-wise scales, after a check of what it takes."""
    assert a.dtype == b.dtype == torch.float8_e4m3fn
    assert a.stride(0) > a.stride(1) == 1, a.stride()
    assert b.stride(1) > b.stride(0) == 1, b.stride()
    assert not any(size % 16 for size in (*a.shape[1:], *b.shape))
    assert len(a)
    assert scale_a.shape == (len(a), 1)
    assert scale_b.shape == (1, b.shape[1])
    assert scale_a.dtype == scale_b.dtype == torch.float32
    assert scale_a.is_contiguous()
    assert scale_b.is_contiguous()
    return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)


@pytest.fixture(autouse=True)
def kernel_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda a, *args, **k: (real if a.is_cuda else kernel)(a, *args, **k))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_FP8, reason="no GPU with fp8"))])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def draw(*shape: int, device: str, seed: int = 0) -> Tensor:
    """Normal values that bf16 represents."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(device)


def error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference, relative to the exact matrix."""
    exact = exact.detach().double().cpu()
    return float((found.detach().double().cpu() - exact).norm() / exact.norm())


def largest_error(found: Tensor, exact: Tensor, rows: Tensor, columns: Tensor) -> float:
    """Largest error of an element of ``rows @ columnsᵀ``, relative to the norms of its two factors."""
    norms = rows.double().norm(dim=1, keepdim=True) * columns.double().norm(dim=1)
    return float(((found.detach().double() - exact.detach()).abs() / norms).max())


@pytest.mark.parametrize("rows", [1, 7, 160])
def test_errors_of_a_product_and_its_gradients(rows, device):
    x, weight, grad = (draw(*s, device=device, seed=i) for i, s in enumerate([(rows, 64), (48, 64), (rows, 48)]))
    bias = draw(48, device=device, seed=3)
    for outliers in (x[3:4], weight[5:6], weight[:, 7], grad[6:7]):
        outliers *= 1e4  # which cost the other rows no precision
    given = [t.clone().requires_grad_() for t in (x, weight, bias)]
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    linear(given[0], as_matrix(given[1], True), given[2]).backward(grad)
    F.linear(*exact).backward(grad.double())
    product = linear(given[0], as_matrix(given[1], True))
    # Rounding to bf16 is an error of 0.002 at most.
    assert 0.005 < largest_error(product, F.linear(*exact[:2]), x, weight) < 0.03
    assert 0.005 < largest_error(given[0].grad, exact[0].grad, grad, weight.t()) < 0.03
    assert error(given[1].grad, exact[1].grad) < 2**-8
    assert error(given[2].grad, exact[2].grad) < 2**-8


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("rows", [5, 600])
def test_errors_of_a_norm_with_a_product_and_an_mlp(rows, keep, device):
    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        norm = RMSNorm(64).to(device, torch.promote_types(dtype, torch.float32))
        shapes = (rows, 64), (64, 64), (192, 64), (64, 96)
        x, *weights = (draw(*s, device=device, seed=i).to(dtype) for i, s in enumerate(shapes))
        x, square, gate_up, down = leaves = [x, *(w / 8 for w in weights)]
        for leaf in leaves:
            leaf.requires_grad_()
        square, gate_up, down = (as_matrix(w, True) for w in (square, gate_up, down))
        assert all(isinstance(w, Fp8Matrix) == (dtype == torch.bfloat16) for w in (square, gate_up, down))
        y = norm.mlp(norm.linear(x, square), gate_up, down, keep)
        y.backward(draw(rows, 64, device=device, seed=9).to(dtype))
        return [y, *(t.grad for t in (*leaves, norm.weight))]

    for found, exact in zip(run(device, torch.bfloat16), run("cpu", torch.float64), strict=True):
        assert 0.003 < error(found, exact) < 0.1, error(found, exact)


def test_the_kernel_multiplies_the_cast_factors(device):
    for rows, columns, out in [(1, 16, 16), (33, 96, 160), (700, 1536, 576)]:
        x, matrix = draw(rows, columns, device=device), draw(out, columns, device=device, seed=1)
        factors = [(cast.double() * scale).cpu() for cast, scale in (cast_rows(x), cast_rows(matrix))]
        for fast in (True, False):
            found = fp8._multiply(x, *cast_rows(matrix), fast)
            assert found.dtype == torch.bfloat16
            assert error(found, factors[0] @ factors[1].t()) < (2**-7 if fast else 2**-8), (rows, fast)


def test_the_cast_is_the_same_when_it_is_fused(monkeypatch):
    matrices = [draw(64, 48, device="cpu"), draw(64, 96, device="cpu")[:, 48:], draw(48, 64, device="cpu").t()]
    matrices[0][7] = 0.0  # a row of zeros has no largest value
    separate = [cast_rows(x) for x in matrices]
    assert not separate[0][0][7].float().any()
    compile_with(monkeypatch, "aot_eager")
    for x, (values, scales) in zip(matrices, separate, strict=True):
        fused = cast_rows(x)
        assert fused[0].is_contiguous()
        assert fused[0].float().equal(values.float())
        assert fused[1].equal(scales)


def test_without_rows_there_are_empty_products_and_gradients_of_zero(device):
    weights = [draw(*s, device=device).requires_grad_() for s in ((48, 64), (192, 64), (64, 96))]
    x = draw(0, 64, device=device).requires_grad_()
    norm = RMSNorm(64).to(device)
    first, gate_up, down = (as_matrix(w, True) for w in weights)
    y = norm.mlp(x, gate_up, down)
    (linear(y, first).sum() + norm.linear(y, first).sum()).backward()
    assert x.grad.shape == (0, 64)
    assert not any(bool(w.grad.any()) for w in weights)


def test_where_products_are_not_in_fp8():
    weight = torch.randn(32, 48).bfloat16().requires_grad_()
    assert isinstance(as_matrix(weight, True), Fp8Matrix)
    assert isinstance(as_matrix(weight, True)[16:], Fp8Matrix)
    for other in (weight[:, :24], weight[:24], weight[:, :0], weight.float(), as_matrix(weight, True)[8:]):
        assert as_matrix(other, True) is other
    assert as_matrix(weight, False) is weight
    with torch.no_grad():  # validation and decoding
        assert as_matrix(weight, True) is weight


USED = ["eagle3", "eagle3.1", "latent", "wide latent", "peagle", "mtp", "dflash", "dspark", "dflash2", "domino"]


@pytest.fixture(scope="module")
def small_target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("small") / "target", hidden=H, vocab_size=V, heads=4)


class Training:
    """A draft in fp32, a batch, and its loss in bf16 or fp8."""

    def __init__(self, form: str, target: Path, use: bool, what: str = "mlp") -> None:
        self.module = make_module(form, target)
        self.module.draft.float()
        if use:
            self.module.draft.multiply_in_fp8()
        self.module.draft.checkpoint_activations(what)
        rng, seeds = random.Random(form), (torch.Generator().manual_seed(i) for i in (0, 1))
        self.batch = pack([document(rng, [i % 3 > 0 for i in range(length)], length) for length in (30, 1, 20)], 13)
        self.head = TargetHead(*(torch.randn(V, H, generator=seed) for seed in seeds), torch.float32)

    def loss(self, half: bool = True) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return self.module.training_loss(self.batch, self.head).loss

    def gradient(self, half: bool = True) -> Tensor:
        self.loss(half).backward()
        return torch.cat([p.grad.flatten() for p in self.module.draft.parameters() if p.grad is not None])


@pytest.mark.parametrize("form", USED)
def test_the_gradient_of_a_draft(form, small_target, monkeypatch):
    """It points where that of fp32 points; what is computed again does not change it; validation is in bf16."""
    monkeypatch.setitem(FORMS, "wide latent", ("eagle3", LATENT, LAYERS))
    products: list[Tensor] = []
    multiply = fp8._multiply
    monkeypatch.setattr(fp8, "_multiply", lambda x, *a, **k: products.append(x) or multiply(x, *a, **k))
    exact = Training(form, small_target, False).gradient(half=False)
    half = Training(form, small_target, False).gradient()
    assert not products
    found, counts = {}, []
    for what in ("none", "mlp", "layer"):
        found[what] = Training(form, small_target, True, what).gradient()
        counts.append(len(products))
        products.clear()
    assert 0 < counts[0] <= counts[1] < counts[2]
    assert F.cosine_similarity(exact, half, dim=0) > 0.99
    assert F.cosine_similarity(exact, found["mlp"], dim=0) > 0.95
    assert found["mlp"].equal(found["none"])
    assert found["mlp"].equal(found["layer"])
    training = Training(form, small_target, True)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            training.module.validation_chains(training.batch, training.head, 3)
        training.module.drafter(training.head, torch.bfloat16)
    assert not products


def test_a_draft_learns_as_in_bf16(small_target):
    losses = []
    for use in (False, True):
        training = Training("eagle3", small_target, use)
        optimizer = torch.optim.AdamW(training.module.draft.parameters(), lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            loss = training.loss()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    bf16, found = losses[:20], losses[20:]
    assert found[-1] < 0.7 * found[0]
    assert found == pytest.approx(bf16, rel=0.01)
    assert found != bf16


def test_a_checkpoint_of_fp8_goes_on_without_it(target, features, tmp_path, monkeypatch):
    monkeypatch.setattr(lightning_modules.base, "check_fp8", lambda *_: None)
    recipes = [
        recipe(
            target,
            features,
            tmp_path / str(use),
            trainer__precision="bf16-mixed",
            trainer__max_steps=2,
            model__init_args__fp8=use,
        )
        for use in (True, False)
    ]
    saved = fit(recipes[0]) / "checkpoints" / "last.ckpt"
    run = fit(recipes[1], "--trainer.max_steps", 4, "--ckpt_path", saved)
    assert list(losses(run)) == [3, 4]


def test_where_fp8_is_impossible_fit_says_so_at_its_start(target, features, tmp_path, capsys):
    path = recipe(target, features, tmp_path, model__init_args__fp8=True)
    assert main(["fit", "--config", str(path)]) == 2
    message = "model.fp8: device cpu has no fp8 products; they need an NVIDIA GPU of compute capability 8.9"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_gpu_that_is_too_old_and_another_precision_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA RTX A6000")
    with pytest.raises(UserError, match=r"model.fp8: NVIDIA RTX A6000 has no fp8 products"):
        check_fp8(torch.device("cuda", 0), "bf16-mixed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    check_fp8(torch.device("cuda", 0), "bf16-mixed")
    with pytest.raises(UserError, match=r"model.fp8: trainer.precision is 32-true, but must be bf16-mixed"):
        check_fp8(torch.device("cuda", 0), "32-true")


@pytest.mark.parametrize("name", ["medusa", "standalone"])
def test_drafts_of_other_layers_refuse(name, target):
    config = {"draft_config": {"num_hidden_layers": 2}} if name == "standalone" else {}
    with pytest.raises(UserError, match=r"model.fp8: \w+ has no layers that multiply in fp8; leave it out"):
        algorithms()[name](str(target), fp8=True, **config)


@pytest.mark.skipif(not HAS_FP8, reason="no GPU with fp8")
@pytest.mark.parametrize("name", ["eagle3.yaml", "peagle-smollm2.yaml", "mtp-smollm2.yaml", "dflash-smollm2.yaml"])
def test_recipes_train_in_fp8_on_a_gpu(name, target, features, tmp_path):
    module = {"e": "Eagle3Module", "p": "PEagleModule", "m": "MTPModule", "d": "DFlashModule"}[name[0]]
    model = {**TINY_OPTIONS[module], "init_from": None, "fp8": True}
    model["draft_config"] = {**model["draft_config"], "head_dim": 16}
    options = {
        "--trainer.accelerator": "gpu",
        "--trainer.devices": 1,
        "--trainer.strategy": "auto",
        "--trainer.max_steps": 4,
        "--trainer.limit_val_batches": 0,
        "--trainer.default_root_dir": tmp_path,
        "--data.features": features,
        "--model.target": target,
        **{f"--model.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in model.items()},
    }
    assert main(["fit", "--config", name, *(str(x) for pair in options.items() for x in pair)]) == 0
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(bool(x.isfinite().all()) for x in saved.values())
