"""The direction of imports that docs/design.md promises, held by reading the source."""

from __future__ import annotations

import ast
from functools import cache

import pytest

from tests.paths import ROOT

CONFIG = ("config_error", "model_args", "config")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "llama_tp").rglob("*.py")
}
MODULES = sorted(FILES)


@cache
def imports_of(module, *, also_inside_functions):
    """Names of what a module imports: modules of ours in full, of others as written."""
    tree = ast.parse(FILES[module].read_text())
    nodes = ast.walk(tree) if also_inside_functions else _module_level(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in FILES else node.module)
    return found


def _module_level(tree):
    """All statements that run when the module is imported: neither those of functions nor those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
            yield from _module_level(node)


@cache
def reach_of(module):
    """Everything that is imported with a module, directly or not, packages included; of others the top name."""
    found, queue = set(), [module]
    while queue:
        name = queue.pop()
        if name in FILES:
            parents = {name.rpartition(".")[0]} - {""}
            new = (imports_of(name, also_inside_functions=False) | parents) - found
            found |= new
            queue += new
    return found | {name.split(".")[0] for name in found if name not in FILES}


def package_of(module):
    return ".".join(module.split(".")[:2])


def modules_below(*prefixes, but=()):
    """In order: pytest-xdist's processes must collect the same tests."""
    below = [m for m in MODULES if any(m == prefix or m.startswith(prefix + ".") for prefix in prefixes)]
    assert set(but) <= set(below)
    return [m for m in below if m not in but]


def test_the_walk_sees_the_library():
    """An empty walk would keep any promise."""
    assert len(MODULES) > 30
    assert "llama_tp.engine.scheduler" in reach_of("llama_tp.torchserve.worker")
    assert "torch" in reach_of("llama_tp.torchserve.worker")
    assert "torch" in reach_of("llama_tp.model.transformer")


@pytest.mark.parametrize("module", MODULES)
def test_nothing_in_the_library_imports_torchserve_or_a_test(module):
    names = {name.split(".")[0] for name in imports_of(module, also_inside_functions=True)}
    assert not names & {"ts", "model_archiver", "tests", "handler", "pytest", "hypothesis"}
    if package_of(module) != "llama_tp.bench":  # which measures others, too
        assert "transformers" not in names


@pytest.mark.parametrize("module", modules_below("llama_tp.model"))
def test_the_model_knows_neither_ranks_nor_requests(module):
    names = imports_of(module, also_inside_functions=True) | reach_of(module)
    assert not any(name.startswith("torch.distributed") for name in names)
    packages = {package_of(name) for name in names if name in FILES}
    assert packages <= {"llama_tp", *(f"llama_tp.{name}" for name in ("model", "file_kind", "user_cache", *CONFIG))}


@pytest.mark.parametrize(
    "module",
    [
        "llama_tp.config",
        "llama_tp.config_error",
        "llama_tp.model_args",
        "llama_tp.control_groups",
        "llama_tp.threads",
        "llama_tp.file_kind",
        "llama_tp.user_cache",
        *(f"llama_tp.model.cpu.{name}" for name in ("build", "build_worker", "compiler", "library_cache", "sources")),
        "llama_tp.model.weights",
        "llama_tp.model.published",
        *modules_below("llama_tp.planning"),
        "llama_tp.parallel.sharding",
        "llama_tp.engine.request",
        "llama_tp.engine.block_manager",
        "llama_tp.engine.scheduler",
        "llama_tp.engine.codec",
        "llama_tp.engine.memory",
        "llama_tp.engine.sampling_params",
        *(f"llama_tp.serving.{name}" for name in ("encoding", "errors", "fields", "strict_json", "strict_model")),
        *(
            f"llama_tp.serving.{name}"
            for name in ("generation", "reply_size", "admission", "output", "metrics", "access", "request_log")
        ),
        *modules_below("llama_tp.serving.dialects", "llama_tp.serving.document", "llama_tp.serving.page"),
        "llama_tp.resources",
        *modules_below("llama_tp.checkpoint.hub"),
        "llama_tp.checkpoint.formats.quantization_config",
        *modules_below("llama_tp.text"),
        *modules_below("llama_tp.torchserve", but=("llama_tp.torchserve.worker", "llama_tp.torchserve.follower")),
        *modules_below("llama_tp.cli", but=("llama_tp.cli.console",)),
    ],
)
def test_policy_text_and_configuration_load_without_torch(module):
    assert "torch" not in reach_of(module)


@pytest.mark.parametrize("module", ["llama_tp.engine.scheduler", "llama_tp.engine.block_manager"])
def test_the_scheduler_has_neither_clock_nor_randomness(module):
    names = {name.split(".")[0] for name in imports_of(module, also_inside_functions=True)}
    assert not names & {"time", "datetime", "random", "secrets", "os", "threading", "numpy"}


# What each layer may import, from the lowest to the highest.
LAYERS = {
    "file_kind": (),
    "control_groups": (),
    "resources": (),
    "user_cache": (),
    "config_error": (),
    "model_args": ("file_kind", "config_error"),
    "config": ("config_error",),
    "threads": ("control_groups",),
    "text": ("file_kind",),
    "model": ("user_cache", *CONFIG),
    "parallel": (*CONFIG, "threads", "model"),
    # A conversion checks and keeps the tokenizer.
    "checkpoint": ("file_kind", "user_cache", *CONFIG, "threads", "text", "model", "parallel"),
    "engine": (*CONFIG, "control_groups", "threads", "model", "parallel", "checkpoint"),
    "planning": (*CONFIG, "control_groups", "threads", "resources", "model", "parallel", "engine"),
    "serving": (*CONFIG, "text", "engine"),
    "torchserve": (
        *(*CONFIG, "user_cache", "resources", "threads", "text", "model", "parallel", "checkpoint", "engine"),
        *("planning", "serving"),
    ),
    "bench": (*CONFIG, "threads", "model", "parallel", "checkpoint", "engine", "text", "serving", "torchserve"),
    "cli": (
        *(*CONFIG, "user_cache", "resources", "threads", "text", "model", "parallel", "checkpoint", "engine"),
        *("planning", "torchserve", "bench"),
    ),
}


def test_every_module_is_in_a_layer():
    assert {package_of(module) for module in MODULES} == {
        *(f"llama_tp.{layer}" for layer in LAYERS),
        *("llama_tp", "llama_tp.__main__"),
    }


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_layers_below_it(layer):
    order = list(LAYERS)
    assert all(order.index(below) < order.index(layer) for below in LAYERS[layer])
    may_import = {f"llama_tp.{name}" for name in (layer, *LAYERS[layer])} | {"llama_tp"}
    for module in modules_below(f"llama_tp.{layer}"):
        imported = {package_of(name) for name in imports_of(module, also_inside_functions=True) if name in FILES}
        assert imported <= may_import, module


def test_one_module_knows_each_foreign_format():
    """And those that write one, and the download, which reads a config.json before it fetches the weights; all others
    open a checkpoint of whatever format."""
    formats = "llama_tp.checkpoint.formats."
    general = ("reader", "open", "architecture", "write", "cast", "checklist", "quantized", "quantizing")
    known = {f"llama_tp.{name}" for name in ("checkpoint.demo", "checkpoint.hub.download", "bench.peers")}
    for module in MODULES:
        if module.startswith(formats) or module in known:
            continue
        found = {name for name in imports_of(module, also_inside_functions=True) if name.startswith(formats)}
        assert found <= {formats + name for name in general}, module


@pytest.mark.parametrize(
    ("module", "may_import"),
    [
        ("sampling_params", set()),
        ("grammar", set()),
        ("request", {"sampling_params", "grammar"}),
        ("prompt_lookup", set()),
        ("sequence", {"request", "prompt_lookup"}),
        ("stats", set()),
        ("timing", {"sequence", "stats"}),
        ("step", set()),
        ("block_manager", set()),
        ("codec", {"step"}),
        ("token_masks", {"grammar"}),
        ("draw", {"sampling_params"}),
        ("sampler", {"sampling_params", "draw", "request", "sequence", "token_masks"}),
        ("speculation", {"prompt_lookup", "sequence", "step"}),
        ("scheduler", {"request", "sequence", "step", "block_manager", "speculation"}),
    ],
)
def test_inside_the_engine_policy_and_sampling_stand_alone(module, may_import):
    ours = {name for name in imports_of(f"llama_tp.engine.{module}", also_inside_functions=True) if name in FILES}
    assert ours - {"llama_tp.config", "llama_tp.config_error"} <= {f"llama_tp.engine.{name}" for name in may_import}


def test_text_api_and_engine_meet_only_where_a_service_is_made():
    """And in the terminal, which is a small server of its own."""
    meeting = set()
    for module in MODULES:
        names = imports_of(module, also_inside_functions=True)
        if any(name.startswith("llama_tp.text") for name in names) and any(
            name.startswith(("llama_tp.engine.loop", "llama_tp.engine.engine", "llama_tp.engine.startup"))
            for name in names
        ):
            meeting.add(module)
    meeting -= set(modules_below("llama_tp.bench"))  # which measures all of it
    assert meeting == {"llama_tp.serving.service", "llama_tp.torchserve.worker", "llama_tp.cli.console"}


def test_dialects_and_admission_know_of_the_engine_only_the_types_that_travel():
    for module in set(modules_below("llama_tp.serving")) - {"llama_tp.serving.service"}:
        engine = {name for name in imports_of(module, also_inside_functions=True) if name.startswith("llama_tp.engine")}
        travelling = {"llama_tp.engine.request", "llama_tp.engine.sampling_params"}
        if module == "llama_tp.serving.metrics":
            travelling.add("llama_tp.engine.stats")
        assert engine <= travelling, module


@pytest.mark.parametrize("module", modules_below("llama_tp.serving.dialects"))
def test_a_dialect_knows_nothing_of_limits_and_of_other_dialects(module):
    ours = {name for name in imports_of(module, also_inside_functions=True) if name in FILES}
    assert not ours & {"llama_tp.serving.admission", "llama_tp.serving.service", "llama_tp.serving.output"}
    names = ("base", "events", "formats", "route", "structure", "tools", "turns", "unsupported")
    shared = {f"llama_tp.serving.dialects.{name}" for name in names}
    for name in ours - shared:
        if name.startswith("llama_tp.serving.dialects."):
            own, other = (one.removesuffix("_types").split(".")[:4] for one in (module, name))
            assert own == other, name


def test_no_test_file_is_imported():
    """What several of them need is in a conftest.py, or in a module whose name says what it is."""
    files = list((ROOT / "tests").rglob("*.py"))
    tests = {path.stem for path in files if path.stem.startswith("test_")}
    assert len(tests) > 50
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert not tests & {part for name in names for part in name.split(".")}, f"{path}:{node.lineno}"


def test_no_two_modules_import_each_other():
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path, module])
        if module in done:
            return
        path.append(module)
        for name in sorted(imports_of(module, also_inside_functions=False)):
            if name in FILES:
                visit(name)
        path.pop()
        done.add(module)

    for module in MODULES:
        visit(module)
    assert done == set(MODULES)
