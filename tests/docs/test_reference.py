"""No metric, class, argument, command, recipe or block is missing from the reference."""

import ast
import inspect
import itertools
import re
import textwrap
from dataclasses import fields
from functools import partial

import lightning as L
import pytest
import torch
from pages import ROOT
from training import History, arithmetic, grpo, make_trainer, small_tokens, variety

import lit_specrl
from lit_specrl import (
    DAPO,
    PPO,
    DrafterDistillation,
    KLPenalty,
    NGramDrafter,
    PrefixCache,
    SharedTrunkCritic,
    SpeculativeRollout,
    VLLMEngine,
)
from lit_specrl.bench.command import BENCHMARKS
from lit_specrl.callbacks.logger_report import LAYOUT
from lit_specrl.cli.main import _SUMMARIES
from lit_specrl.prefix_cache import BoundedShare
from lit_specrl.prefix_cache.lenience import AdaptiveLenience

DOCS = ROOT / "docs"
SOURCES = sorted((ROOT / "lit_specrl").rglob("*.py"))
GROUPS = "actor|clip_ratio|completions|critic|drafter|dynamic_sampling|environment|perf|prefix_cache|rewards|sampling|speculation|timing_s|val-core"
NO_METRICS = {"drafter/{}"}  # the purpose of rollouts, which their seeds come from


def page(name: str) -> str:
    return (DOCS / "reference" / f"{name}.md").read_text("utf-8")


def open_form(name: str) -> str:
    """`rewards/{name}/mean` and `rewards/{reward.name}/mean` are the same: `rewards/{}/mean`."""
    return re.sub(r"\{[^}]*\}", "{}", name)


def documented(text: str) -> set[str]:
    """Names in the first column of the tables."""
    cells = re.findall(r"^\| (`.+?) \|", text, re.MULTILINE)
    return {open_form(name) for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


METRICS = documented(page("metrics"))


def texts_of(tree: ast.AST):
    """Every string of a file; what is filled in later is `{}`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)


def names_in_code() -> set[str]:
    """Metrics by the strings of the code: no patterns of charts, no mere beginnings, nothing of benchmarks."""
    names = {
        text
        for source in SOURCES
        if "bench" not in source.parts
        for text in texts_of(ast.parse(source.read_text("utf-8")))
        if re.fullmatch(rf"({GROUPS})/[\w@{{}}/-]+", text) and not text.endswith("/")
    }
    stages = {stage for source in SOURCES for stage in re.findall(r'\btimer\("(\w+)"\)', source.read_text("utf-8"))}
    return names | {f"timing_s/{stage}" for stage in stages}


def covers(known: set[str], name: str) -> bool:
    """Whether a name, or one with something filled in, is known."""
    patterns = (re.escape(entry).replace(re.escape("{}"), "[^/]+") for entry in known)
    return name in known or any(re.fullmatch(pattern, name) for pattern in patterns)


def missing_metrics(names, table) -> list[str]:
    """A name whose last part varies, such as `prefix_cache/{}`, is told by the runs."""
    told_by_runs = {name for name in names if name.endswith("/{}")}
    return sorted(name for name in names - told_by_runs - NO_METRICS if not covers(table, name))


def test_every_metric_of_the_code_is_in_the_table():
    names = names_in_code()
    assert len(names) > 60 and {"actor/grad_norm", "rewards/{}/mean", "timing_s/update_actor"} <= names
    assert missing_metrics(names, METRICS) == []


def test_every_metric_of_the_table_is_in_the_code():
    strings = {text for source in SOURCES for text in texts_of(ast.parse(source.read_text("utf-8")))}
    names = names_in_code() | strings
    templates = {name for name in names if re.match(rf"({GROUPS})/", name)} | {"{}/lr", "{}/grad_norm"}
    unknown = [name for name in METRICS if name not in names and not covers(templates, name)]
    parts = [name for name in unknown if name.split("/")[-1].split("@")[0] not in strings]
    assert parts == []


def run(module, *callbacks):
    history = History()
    make_trainer(history, *callbacks, limit_val_batches=2, check_val_every_n_epoch=1, max_epochs=2).fit(
        module, datamodule=arithmetic(validation=arithmetic().sources["train"]["arithmetic"])
    )
    found = {name for step in history.steps.values() for name in step if name != "uids"}
    times = {name for name in module.step_metrics if name.startswith("timing_s/")}
    return found | times | {name for _, evaluation in history.evaluations for name in evaluation}


RUNS = {
    "grpo": lambda model: run(
        grpo(model, [variety, small_tokens], beta=0.1, num_iterations=2),
        PrefixCache(
            adaptive_lenience=AdaptiveLenience(0.5, min_fraction=1.0),
            reuse_policy=BoundedShare(0.5),
            control_fraction=0.25,
            max_reuses=2,
        ),
    ),
    "dapo": lambda model: run(
        DAPO(
            model,
            [variety],
            num_generations=4,
            max_completion_length=12,
            optimizer=partial(torch.optim.AdamW, lr=1e-3),
        )
    ),
    "ppo": lambda model: run(
        PPO(model, [variety], max_completion_length=12, beta=0.1, kl=KLPenalty("k1", in_reward=True, target=0.1))
    ),
    "ppo_shared": lambda model: run(
        PPO(model, [variety], critic=SharedTrunkCritic(), num_generations=2, max_completion_length=12)
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_logs_is_in_the_table(name, model_folder):
    found = RUNS[name](model_folder)
    assert len(found) > 30
    assert sorted(metric for metric in found if not covers(METRICS, metric)) == []


def test_the_table_defines_what_is_charted():
    drafting = SpeculativeRollout(VLLMEngine(), NGramDrafter())
    layouts = [LAYOUT, *(callback.charts() for callback in (PrefixCache(), drafting, DrafterDistillation()))]
    for chart in (chart for layout in layouts for charts in layout.values() for chart in charts.values()):
        for pattern in chart[1]:
            assert any(re.search(pattern, name.replace("{}", "x")) for name in METRICS), pattern


# ------------------------------------------------------------------------------------------------------------ classes

DIRECTIVES = re.findall(r"^::: (\S+)", page("api"), re.MULTILINE)


def resolved(path: str):
    module, _, name = path.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


OBJECTS = {path: resolved(path) for path in DIRECTIVES}
SAID_BY_THE_NAME = {
    "RolloutRequest": {"prompts", "sampling"},
    "Rollouts": {"request"},
    "Experience": {"policy_version"},
    "Continuation": {"token_ids", "logprobs", "finish_reason"},
}
CLASSES = [entry for entry in OBJECTS.values() if inspect.isclass(entry)]


def public():
    yield from (getattr(lit_specrl, name) for name in lit_specrl.__all__)
    for room in ("data", "rewards", "prefix_cache", "drafting", "callbacks", "algorithms", "engines"):
        module = __import__(f"lit_specrl.{room}", fromlist=["__all__"])
        names = getattr(module, "__all__", [])
        yield from (entry for name in names if inspect.isclass(entry := getattr(module, name)))


def test_every_public_class_is_in_the_reference():
    missing = sorted({entry.__name__ for entry in public() if entry not in OBJECTS.values()})
    assert missing == []


def arguments_of(kind) -> set[str]:
    """Arguments of a class's own constructor."""
    if "__init__" not in vars(kind) or kind.__init__ is object.__init__:
        return set()
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL} - {"self"}


def explained_in(kind) -> set[str]:
    """Arguments that the docstring has, and fields with a text below them."""
    found = set(re.findall(r"^    ([\w]+): ", kind.__doc__ or "", re.MULTILINE))
    found |= set(re.findall(r"^        ([\w]+): ", kind.__doc__ or "", re.MULTILINE))
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
    for node, following in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
            found.add(node.target.id)
    return found


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_argument_is_explained(kind):
    assert arguments_of(kind) - explained_in(kind) - SAID_BY_THE_NAME.get(kind.__name__, set()) == set()


@pytest.mark.parametrize("name", [*_SUMMARIES])
def test_every_command_is_in_the_reference(name):
    assert re.search(rf"\| .*`{name}`", page("command-line"))


@pytest.mark.parametrize("name", [*BENCHMARKS])
def test_every_benchmark_is_described(name):
    assert f"bench {name}" in (DOCS / "guides" / "benchmarks.md").read_text("utf-8")


@pytest.mark.parametrize(
    "path",
    [str(path.relative_to(ROOT)) for top in ("recipes", "configs") for path in sorted((ROOT / top).rglob("*.yaml"))],
)
def test_every_recipe_and_block_is_in_the_reference(path):
    assert f"| `{path}` |" in page("configuration")


def test_every_recipe_says_what_it_reaches():
    table = (ROOT / "recipes" / "README.md").read_text("utf-8")
    assert all(f"[{path.name}]({path.name})" in table for path in (ROOT / "recipes").glob("*.yaml"))


def test_every_hook_is_described():
    hooks = [name for name, value in vars(lit_specrl.RolloutCallback).items() if callable(value)]
    text = (DOCS / "hooks.md").read_text("utf-8")
    assert len(hooks) >= 8
    assert [name for name in hooks if f"`{name}(" not in text and f"`{name}`" not in text] == []


@pytest.mark.parametrize("kind", [lit_specrl.RolloutRequest, lit_specrl.Rollouts, lit_specrl.Experience])
def test_every_field_of_a_carrier_is_described(kind):
    text = (DOCS / "hooks.md").read_text("utf-8").split(f"## `{kind.__name__}`")[1].split("\n## ")[0]
    assert [name for name in (field.name for field in fields(kind)) if f"`{name}`" not in text] == []


# ------------------------------------------------------------------------------------------ the tests see what is wrong


def test_what_is_missing_is_seen():
    table = documented("| `a/b`, `rewards/{name}/mean` | x |\n| `c` | y |\n")
    assert table == {"a/b", "rewards/{}/mean", "c"}
    assert covers(table, "rewards/math/mean") and not covers(table, "rewards/math/std")
    assert missing_metrics({"perf/new", "rewards/{}/mean"}, table) == ["perf/new"]

    class Unexplained:
        """Something.

        Args:
            known: a number.
        """

        def __init__(self, known: int, unknown: int) -> None: ...

    assert arguments_of(Unexplained) - set(re.findall(r"^\s+(\w+): ", Unexplained.__doc__, re.MULTILINE)) == {"unknown"}
    assert isinstance(L.Trainer, type)
