"""Rules, schedules, rewards, stored steps and guidance are asked: nothing outside their own file tests their class."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("data", "rewards", "fuse", "train", "scripts")
TREES = {
    file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
    for folder in FOLDERS
    for file in sorted((ROOT / folder).rglob("*.py"))
}


def _unsubscripted(base: ast.expr) -> ast.expr:
    return base.value if isinstance(base, ast.Subscript) else base


CLASSES = {
    node.name: (file, {base.id for base in map(_unsubscripted, node.bases) if isinstance(base, ast.Name)})
    for file, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef)
}
# The classes of each group are these and all that are derived from them.
GROUPS = {
    "rules": {"FusionRule"},
    "schedules": {"VarianceSchedule"},
    "rewards": {"Weighted", "SingleTerm", "Shaped", "NetworkReward", "RemoteReward", "TrainingReward"},
    "steps": {"Step", "NoisedPairs", "Trajectory"},
    "guidance": {"Guidance"},
}
# `getattr` with a default, of objects that are none of these: modules, errors, arguments, parts of pipelines.
DEFAULTS = {
    "fuse/backbones/unet_checks.py: config.'hidden_size'",
    "fuse/backbones/unet_checks.py: config.'max_position_embeddings'",
    "fuse/diffusion/schedulers.py: scheduler.'betas'",
    "rewards/clip.py: features.'pooler_output'",
    "rewards/over_http.py: error.'reason'",
    "rewards/protocol.py: reward.'close'",
    "rewards/server.py: error.'strerror'",
    "rewards/user_code.py: module.function",
    "rewards/worker/process.py: module.name",
    "scripts/cli/completion.py: parsed_args.'set'",
    "scripts/cli/main.py: parsed.'continued'",
    "scripts/cli/main.py: parsed.'overwrite'",
    "scripts/cli/main.py: parsed.'world'",
    "scripts/cli/parser.py: action.'check'",
    "scripts/cli/parser.py: found.action.dest",
    "train/arguments.py: action.type.'__name__'",
}


def derived(names: set[str]) -> set[str]:
    """Classes with these names, and those derived from them."""
    found = set(names)
    while more := {name for name, (_, bases) in CLASSES.items() if bases & found} - found:
        found |= more
    return found


def compared_classes(tree: ast.AST) -> Iterator[str]:
    """The classes that `isinstance`, `issubclass`, `type(x) is …` and `match` name."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            named: list[ast.AST] = list(node.args[1:])
        elif isinstance(node, ast.MatchClass):
            named = [node.cls]
        elif isinstance(node, ast.Compare) and any(
            isinstance(side, ast.Call) and isinstance(side.func, ast.Name) and side.func.id == "type"
            for side in (node.left, *node.comparators)
        ):
            named = [node.left, *node.comparators]
        else:
            continue
        for part in named:
            yield from (inner.id for inner in ast.walk(part) if isinstance(inner, ast.Name))
            yield from (inner.attr for inner in ast.walk(part) if isinstance(inner, ast.Attribute))


@pytest.mark.parametrize("group", GROUPS)
def test_no_class_of_a_group_is_tested_outside_its_file(group: str) -> None:
    assert GROUPS[group] <= CLASSES.keys()
    classes = derived(GROUPS[group])
    assert len(classes) > 1 or group == "guidance"
    tested = [
        (file, name)
        for file, tree in TREES.items()
        for name in compared_classes(tree)
        if name in classes and CLASSES[name][0] != file
    ]
    # A file of users is loaded as what it is named for: that its class is a rule is checked once.
    assert [pair for pair in tested if pair != ("fuse/rules/registry.py", "FusionRule")] == []


def test_attributes_are_declared_and_not_looked_for() -> None:
    found = {
        f"{file}: {ast.unparse(node.args[0])}.{ast.unparse(node.args[1])}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and len(node.args) == 3
    }
    assert found == DEFAULTS
