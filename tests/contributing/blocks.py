"""Loads the worked examples of CONTRIBUTING.md like files that a contributor would write."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import sys
from types import ModuleType

GUIDE = pathlib.Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"


def load_example(name: str, folder: pathlib.Path) -> ModuleType:
    """Writes the code block that starts with `# NAME.py` to a file, and imports it.

    Args:
            name: Name of the file, without its suffix.
            folder: Folder of the file, outside of the package.
    """
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (text,) = [block for block in blocks if block.startswith(f"# {name}.py\n")]
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look up a function's module by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
