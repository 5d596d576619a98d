"""Golden files: results of versioned rules on fixed inputs, with the version."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any


def require_unchanged(path: pathlib.Path, version: int, rules: Mapping[str, Any]) -> None:
    """Fails if a result or the version differs from the golden file."""
    golden = json.loads(path.read_text(encoding="utf-8"))
    assert golden["rules_version"] == version, f"write {path} anew"
    changed = _list_changes(golden, rules)
    assert not changed, (
        f"{len(changed)} results differ from those of RULES_VERSION {version}, recorded with "
        f"{golden.get('packages')}: raise it and write {path} anew\n" + "\n".join(changed[:5])
    )


def write(path: pathlib.Path, version: int, rules: Mapping[str, Any], **facts: Any) -> None:
    """Writes the golden file, unless results changed and the version did not."""
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        known = {name: result for name, result in rules.items() if name in before["rules"]}
        if before["rules_version"] == version and (changed := _list_changes(before, known)):
            raise SystemExit(f"RULES_VERSION is still {version}, and results changed: {changed}")
    content = {"rules_version": version, **facts, "rules": rules}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def _list_changes(golden: Mapping[str, Any], rules: Mapping[str, Any]) -> list[str]:
    rules = json.loads(json.dumps(rules))
    return [
        f"{name}: was {golden['rules'].get(name)}, is {result}"
        for name, result in rules.items()
        if result != golden["rules"].get(name)
    ]
