import ast
import re
from pathlib import Path

import rec

FOLDER = Path(rec.__file__).parent
LISTED = re.findall(r"^    (\w+)  +\S", rec.__doc__ or "", re.M)


def test_every_module_is_on_the_map_once() -> None:
    modules = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
    assert sorted(LISTED) == modules


def test_modules_import_only_from_those_above_them() -> None:
    wrong = []
    for name in LISTED:
        for node in ast.parse((FOLDER / f"{name}.py").read_text()).body:
            imported = _modules_of(node)
            wrong += [f"{name} imports {other}" for other in imported if LISTED.index(other) >= LISTED.index(name)]
    assert not wrong


def _modules_of(node: ast.stmt) -> list[str]:
    """Modules of rec that a top-level import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("rec.")]
    if isinstance(node, ast.ImportFrom) and node.module == "rec":
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rec."):
        return [str(node.module).split(".")[1]]
    return []
