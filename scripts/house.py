"""The sizes that keep this package readable: prints them, status 1 if a limit is broken.

python scripts/house.py
"""

from __future__ import annotations

import ast
import statistics
import sys
from pathlib import Path
from typing import Any

LIMITS = {
    "top modules": 12,
    "top folders": 11,
    "package lines": 27_200,
    "longest file": 500,
    "median file": 250,
    "functions above 70 lines": 0,
    "reading path lines": 4_500,
}
READING_PATH = (
    "types", "config/schema", "advantage", "advantage_input", "loss", "batching", "step", "trainer",
    "rollout/collector", "rollout/hf", "model/policy",
)  # fmt: skip
"""An afternoon: these files, in this order, are a whole training step."""


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def longer_than(limit: int, path: Path, *kinds: type) -> list[str]:
    """The functions or classes of a file above `limit` lines, as "file.py:name (lines)"."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, kinds) and (lines := node.end_lineno - node.lineno + 1) > limit:
            found.append(f"{path.name}:{node.name} ({lines})")
    return found


def measure(root: Path) -> dict[str, Any]:
    """The figures of the project in `root`: numbers, or lists of what is too long."""
    package = root / "mm_agrae"
    sizes = {path: lines_of(path) for path in sorted(package.rglob("*.py"))}
    functions, classes = [], []
    for path in sizes:
        functions += longer_than(70, path, ast.FunctionDef, ast.AsyncFunctionDef)
        classes += longer_than(400, path, ast.ClassDef)
    longest = max(sizes, key=lambda path: sizes[path])
    tests = sum(map(lines_of, (root / "tests").rglob("*.py")))
    return {
        "top modules": len([p for p in package.glob("*.py") if p.stem != "__init__"]),
        "top folders": len([p for p in package.iterdir() if (p / "__init__.py").is_file()]),
        "package lines": sum(sizes.values()),
        "longest file": sizes[longest],
        "longest file's name": str(longest.relative_to(package)),
        "median file": statistics.median(sizes.values()),
        "functions above 70 lines": functions,
        "classes above 400 lines": classes,
        "reading path lines": sum(lines_of(package / f"{name}.py") for name in READING_PATH),
        "test lines per line": round(tests / sum(sizes.values()), 2),
    }


def violations(figures: dict[str, Any]) -> list[str]:
    """A line for each figure above its limit."""
    found = []
    for name, limit in LIMITS.items():
        value = figures[name]
        if (len(value) if isinstance(value, list) else value) > limit:
            found.append(f"{name}: {value}, at most {limit:,}")
    return found


def main() -> int:
    figures = measure(Path(__file__).resolve().parent.parent)
    for name, value in figures.items():
        limit = f"  (at most {LIMITS[name]:,})" if name in LIMITS else ""
        print(f"{name:26} {', '.join(value) or 0 if isinstance(value, list) else value}{limit}")
    broken = violations(figures)
    print("\n".join(["", *broken]) if broken else "")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
