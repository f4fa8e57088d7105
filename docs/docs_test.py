"""The documents hold: their code runs, their links lead somewhere, their tables are what the registries say.

`python docs/docs_test.py` writes the tables anew.
"""

import os
import re
import subprocess
import sys

import pytest
from _testing import DOCUMENTS, MATHEMATICS, ROOT, TABLES, TELLERS, blocks, document, names, prose, with_tables

from psgd.geometry import GEOMETRIES
from psgd.methods import METHODS


# ---- code -------------------------------------------------------------------------------
def program(path):
    """The Python of a document, each line at its own number, so that an error tells where it is."""
    lines = [""] * len(path.read_text().splitlines())
    for said, start, held in blocks(path):
        if said == "python":
            lines[start : start + len(held)] = held
    return "\n".join(lines)


WITH_CODE = [path for path in DOCUMENTS if program(path).strip()]


@pytest.mark.parametrize("path", WITH_CODE, ids=names(WITH_CODE))
def test_python_runs(path, tmp_path):
    script = tmp_path / f"{path.name}.py"
    script.write_text(program(path))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- links ------------------------------------------------------------------------------
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(path):
    """The anchors that GitHub gives to the headings of a document."""
    heads = re.findall(r"^#+ +(.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", DOCUMENTS, ids=names(DOCUMENTS))
def test_local_links_lead_somewhere(path):
    for link in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


# ---- tables -----------------------------------------------------------------------------
@pytest.mark.parametrize("name", TABLES)
def test_tables_are_what_the_registries_say(name):
    assert document(name).read_text() == with_tables(name), f"run `python docs/docs_test.py`, which mends {name}"


@pytest.mark.parametrize("path", TELLERS, ids=names(TELLERS))
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_named(path, name):
    assert re.search(rf"\b{name}\b", path.read_text()), f"{path.name} does not name {name}"


@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_geometry_is_named(name):
    assert re.search(rf"\b{re.escape(name)}\b", MATHEMATICS.read_text())


def main():
    for name in TABLES:
        document(name).write_text(with_tables(name))


if __name__ == "__main__":
    main()
