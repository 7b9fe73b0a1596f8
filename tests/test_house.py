"""The house: each file imports only from those above it, and the product knows nothing of study/ and bench/."""
import ast
from pathlib import Path

import pytest
from conftest import ROOT

# top to bottom, as README lists them
ORDER = ["functions", "model", "decoding", "tokenizer", "constraints", "common", "records", "dataset", "lora",
         "checkpoint", "force", "sample", "figures", "data", "train_sft", "pretrain", "augment", "evaluate", "train_rl",
         "demo"]
FILES = [f"{name}.py" for name in ORDER if name != "data"]
PRODUCT = [*FILES, *(f"data/{path.name}" for path in sorted((ROOT / "data").glob("*.py")))]


def imports(path, everywhere):
    """The names of the modules that a file imports, at the top level or everywhere."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def row(path):
    return ORDER.index("data" if path.startswith("data/") else path.removesuffix(".py"))


@pytest.mark.parametrize("path", PRODUCT)
def test_a_file_imports_only_from_those_above(path):
    own = [name.partition(".")[0] for name in imports(path, everywhere=True)]
    below = {name for name in own if name in ORDER and ORDER.index(name) > row(path)}
    # a command that calls what stands below does so inside a function
    assert below <= {"lora.py": {"checkpoint", "train_sft"}, "data/prepare.py": {"augment"}}.get(path, set())
    top = [name.partition(".")[0] for name in imports(path, everywhere=False)]
    assert not below & set(top)
    assert not {"study", "bench", "tests"} & set(own)
    assert ("matplotlib" in own) == (path == "figures.py")


def test_every_file_of_the_root_has_a_row():
    assert sorted(path.name for path in ROOT.glob("*.py")) == sorted(FILES)
    assert not list((ROOT / "base").glob("*.py"))


@pytest.mark.parametrize("path", [str(path.relative_to(ROOT)) for folder in (".", "data", "study", "bench")
                                  for path in sorted((ROOT / folder).glob("*.py"))])
def test_a_script_runs_as_the_module_that_it_is(path):
    """So that no class exists twice, as __main__.LoRALinear and lora.LoRALinear."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if "\ndef main(" in text:
        module = Path(path).with_suffix("").as_posix().replace("/", ".")
        assert text.endswith(f'if __name__ == "__main__":\n    from {module} import main\n    main()\n')
