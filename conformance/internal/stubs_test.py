import subprocess
import sys

import pytest

from conformance.internal.stubs import ROOT, STUBS


@pytest.mark.parametrize("path", STUBS)
def test_the_stub_is_up_to_date(path):
    assert (ROOT / path).read_text() == STUBS[path](), "run `make stubs`"


def test_a_type_checker_sees_names_and_hyperparameters(tmp_path):
    (tmp_path / "use.py").write_text(
        "import torch, psgd_jax_backend, psgd_torch_backend\n"
        "o = psgd_torch_backend.Procrustes([torch.ones(2)], lr=0.1, momentum=0.9, dtype=torch.bfloat16)\n"
        "t = psgd_jax_backend.procrustes(0.1, weight_decay=0.0)\n"
        "names: tuple[str, ...] = psgd_jax_backend.scale_by_procrustes.static_args\n"
        "psgd_torch_backend.Procrustes([], momentun=0.9)\n"
        "psgd_jax_backend.procrustes(learning_rat=0.9)\n"
    )
    # With the options of `make lint`: what mypy knows of PyTorch and JAX since then is not worked out again.
    command = [sys.executable, "-m", "mypy", "--no-error-summary"]
    done = subprocess.run([*command, str(tmp_path / "use.py")], capture_output=True, text=True, cwd=ROOT)
    errors = done.stdout.splitlines()
    assert [line.split(":")[1] for line in errors if "error" in line] == ["5", "6"], done.stdout + done.stderr
