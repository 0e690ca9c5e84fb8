"""Every text that a person may read, in one file: `python -m tests.wording` writes docs/wording.md.

Texts stand in the code where they are said. Here they are collected from its syntax trees, so that they can
be read as one: labels and notes of the page, what runs and models say, errors, the command line. A test fails
while the file says something else than the code.
"""

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.server import ROOT

FILE = ROOT / "docs" / "wording.md"
# In this order; of modules, the rest of ecodiff comes last.
ROOMS = {
    "The page": "ecodiff/app/ui",
    "The app behind it": "ecodiff/app",
    "Runs": "ecodiff/runs",
    "The command line": "ecodiff/cli",
    "The package": "ecodiff",
}
# Code in other languages, and the layers that travel with a checkpoint and speak to programmers only.
SILENT = ("theme.py", "ecodiff_sliced_v1.py", "_moved.py")
SPOKEN = {"label", "info", "placeholder", "title", "help", "description", "epilog", "words", "metavar"}
ABOUT = """Every label, note, error and help text, to be read top to bottom; braces are filled in. Made from
the code by `python -m tests.wording`: change a text where it stands, and make this file again (a test fails
until then)."""
NAMED = {"Tab", "Accordion", "Button", "DownloadButton", "UploadButton", "Markdown"}


def texts(path: Path) -> list[str]:
    """The texts in a module, in the order of its lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    silent = {id(node) for node in _silent(tree)}
    spoken = {id(node) for node in _spoken(tree)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in silent:
            said = plain(node)
            filled = isinstance(node, ast.JoinedStr)
            if (id(node) in spoken and re.search("[A-Za-z]", said)) or is_sentence(said, 2 - filled):
                found.append((node.lineno, node.col_offset, said))
    return list(dict.fromkeys(said for _, _, said in sorted(found)))


def _silent(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that nobody reads: docstrings, types, parts of a string that is given as a whole."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value
        if isinstance(node, ast.JoinedStr):
            yield from (part for part in node.values if isinstance(part, ast.Constant))
        if isinstance(node, ast.arg | ast.AnnAssign | ast.Subscript):  # types in quotes
            yield from ast.walk(node.slice if isinstance(node, ast.Subscript) else node.annotation or node)


def _spoken(tree: ast.AST) -> Iterator[ast.AST]:
    """What is given for a label, an error and the like: texts even of one word."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from (keyword.value for keyword in node.keywords if keyword.arg in SPOKEN)
            if getattr(node.func, "attr", "") in NAMED:
                yield from node.args[:1]
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from node.exc.args[:1]


def plain(node: ast.AST) -> str:
    """A string as it is read: without its tags, and with what is filled in as {…}."""
    if isinstance(node, ast.Constant):
        said = node.value if isinstance(node.value, str) else ""
    else:
        parts = (
            part.value if isinstance(part, ast.Constant) else _filled(part.value) for part in node.values
        )
        said = "".join(parts)
    return " ".join(html.unescape(re.sub(r"</?[a-z][^>]*>", " ", said)).split())


def _filled(value: ast.AST) -> str:
    """What is filled in, in one word."""
    if isinstance(value, ast.Call):
        return _filled(value.func)
    if isinstance(value, ast.Attribute):
        return f"{{{value.attr}}}"
    if isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Constant):
        return f"{{{value.slice.value}}}"
    return f"{{{value.id}}}" if isinstance(value, ast.Name) else "{…}"


def is_sentence(said: str, least: int) -> bool:
    """True for `least` words or more, of letters, that are no path, pattern or piece of code."""
    said = re.sub(r"\{[^}]*\}", "{}", said)
    words = re.findall(r"(?<![\w./_|{}-])[A-Za-z][a-z']+(?![\w/_=(|{}])", said)
    return len(words) >= least and " " in said and not re.search(r"[\\^]|[=-]>|\w\(\)|;$| \| ", said)


def document() -> str:
    """The whole file."""
    lines = ["# Wording", "", ABOUT, ""]
    seen: set[Path] = set()
    for title, room in ROOMS.items():
        lines += [f"## {title}", ""]
        for path in sorted((ROOT / room).rglob("*.py")):
            if path in seen or path.name in SILENT:
                continue
            if (found := texts(path)) and (room != "ecodiff/app" or "ui" not in path.parts):
                lines += [f"### {path.relative_to(ROOT)}", "", "~~~text", *found, "~~~", ""]
            seen.add(path)
    return "\n".join(lines)


if __name__ == "__main__":
    FILE.write_text(document(), encoding="utf-8")
