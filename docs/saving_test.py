"""What docs/saving.md shows survives being killed: whenever it happens, the last whole state loads."""

from __future__ import annotations

import os
import subprocess
import sys

from _testing import ROOT, blocks

PAGE = ROOT / "docs" / "saving.md"
KILLS = 6
# Children that save again and again, each in the way of the page, and are killed while they do.
PROGRAM = """
import os, random, signal, sys, time, warnings
import torch
from psgd_torch_backend import Procrustes

warnings.simplefilter("ignore")
p = torch.nn.Parameter(torch.ones(256, 256))
optimizer = Procrustes([p])
p.grad = torch.ones_like(p)
optimizer.step()


def state(step):
    kept = {"momentum": optimizer.state[p]["momentum"], "Q": optimizer.state[p]["Q"]["0"]}
    return {"optimizer": kept, "step": torch.tensor(step)}


def by_file(step):
    replace_file(Path("one.pt"), lambda file: torch.save(state(step), file))


def file_step():
    return int(torch.load("one.pt", weights_only=True)["step"])


def by_folder(step):
    save_folder(Path("many"), step, state(step))


def folder_step():
    loaded = state(0)
    checkpoint.load(loaded, checkpoint_id=latest(Path("many")))
    return int(loaded["step"])


def killed(save, begin, wait):
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        for step in range(begin + 1, 10**6):
            save(step)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL  # and did not end by itself


Path("many").mkdir()
seeded = random.Random(0)
for save, read in ((by_file, file_step), (by_folder, folder_step)):
    save(1)
    begin = 1
    for _ in range(int(sys.argv[1])):
        killed(save, begin, seeded.uniform(0.05, 0.15))
        step = read()
        assert step >= begin, (step, begin)
        begin = step
    assert begin > 1, "nothing was saved while children lived"
    print(save.__name__, begin)
"""


def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path):
    shown = ["\n".join(held) for said, _, held in blocks(PAGE) if said == "python" and any("def " in x for x in held)]
    assert len(shown) == 2
    script = tmp_path / "kills.py"
    script.write_text("\n".join([*shown, PROGRAM]))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), os.environ.get("KILLS", str(KILLS))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[::2] == ["by_file", "by_folder"]
