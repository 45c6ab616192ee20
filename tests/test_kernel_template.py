"""What every operation of kernels/ has, read off the syntax trees: reference, fake, autocast rule, device guard, check."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.fast

KERNELS = Path(__file__).resolve().parent.parent / "kernels"


class Operation:
    """An operator ``clipcore::<name>``: the function behind it, and the file or folder that it belongs to."""

    def __init__(self, name: str, function: str, path: Path) -> None:
        self.name, self.function = name, function
        is_in_folder = path.parent != KERNELS
        self.files = sorted(path.parent.glob("*.py")) if is_in_folder else [path]
        self.trees = [ast.parse(file.read_text()) for file in self.files]

    def defined(self) -> dict[str, ast.FunctionDef]:
        """Return the functions of its files by name."""
        nodes = [node for tree in self.trees for node in tree.body]
        return {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}

    def calls(self) -> list[ast.Call]:
        """Return all calls in its files."""
        return [
            node for tree in self.trees for node in ast.walk(tree) if isinstance(node, ast.Call)
        ]


def called(node: ast.AST) -> str:
    """Return ``a.b`` of a call of it, or of the name itself."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ast.unparse(node)


def text_of(node: ast.AST) -> str:
    """Return what a string says; of one with a name in it the name's place is empty."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    return ""


def operations() -> list[Operation]:
    """Find every operator: by the decorator, by the call, and by layer_norm.py's own ``operator``."""
    found = []
    for path in sorted(KERNELS.glob("**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                for decorator in node.decorator_list:
                    if called(decorator).endswith("library.custom_op"):
                        assert isinstance(decorator, ast.Call)
                        name = text_of(decorator.args[0]).removeprefix("clipcore::")
                        found.append(Operation(name, node.name, path))
            elif isinstance(node, ast.Call) and node.args:
                if called(node) == "operator":
                    name = ast.unparse(node.args[0])
                    found.append(Operation(name, name, path))
                elif called(node).endswith("library.custom_op") and len(node.args) == 2:
                    name = text_of(node.args[0]).removeprefix("clipcore::")
                    if name:
                        found.append(Operation(name, ast.unparse(node.args[1]), path))
    return found


OPERATIONS = operations()


def test_all_operators_are_found():
    import clipcore.kernels.adamw
    import clipcore.kernels.attention
    import clipcore.kernels.contrastive
    import clipcore.kernels.embed_layer_norm
    import clipcore.kernels.gelu
    import clipcore.kernels.layer_norm
    import clipcore.kernels.patchify
    import clipcore.kernels.sigmoid
    import clipcore.kernels.similarity
    import clipcore.kernels.similarity_topk  # noqa: F401

    names = [operation.name for operation in OPERATIONS]
    registered = {
        schema.name.removeprefix("clipcore::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("clipcore::")
    }
    assert len(names) == len(set(names)) and registered == set(names)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
class TestOperation:
    def test_has_a_reference_of_its_name(self, operation):
        path = operation.files[0]
        name = path.stem if path.parent == KERNELS else path.parent.name
        assert f"{name}_ref" in operation.defined()

    def test_has_a_fake_for_each_operator_of_its_files(self, operation):
        mine = [other for other in OPERATIONS if other.files == operation.files]
        fakes = [
            decorator
            for tree in operation.trees
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            for decorator in node.decorator_list
            if called(decorator).endswith(".register_fake")
        ]
        assert len(fakes) == len(mine)

    def test_has_an_autocast_rule(self, operation):
        rules = [call for call in operation.calls() if called(call).endswith("register_autocast")]
        named = {text_of(call.args[0]) for call in rules}
        # `operator` registers the rule of each operator that it makes.
        made = {
            ast.unparse(call.args[0])
            for call in operation.calls()
            if called(call) == "operator" and call.args
        }
        assert operation.name in named | made

    def test_launches_on_the_device_of_its_tensors(self, operation):
        function = operation.defined()[operation.function]
        guards = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
        assert any(called(guard) == "launch.on_device" for guard in guards)

    def test_is_checked_at_a_public_function(self, operation):
        path = operation.files[0]
        name = path.stem if path.parent == KERNELS else path.parent.name
        public = [
            node
            for function, node in operation.defined().items()
            if function.startswith(name) and not function.endswith("_ref")
        ] + [node for function, node in operation.defined().items() if "_" + name in function]
        documented = [node for node in public if "Raises" in (ast.get_docstring(node) or "")]
        assert documented, f"no public function beside {operation.name} says what it raises"
        for function in documented:
            checks = [
                node
                for node in ast.walk(function)
                if isinstance(node, ast.Raise)
                or (isinstance(node, ast.Call) and "check" in called(node))
            ]
            assert checks, f"{function.name} checks nothing"
