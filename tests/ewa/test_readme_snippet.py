"""The scheme's public interface as documented, in a fresh interpreter that knows nothing of this repository."""

import os
import subprocess
import sys
from pathlib import Path

SNIPPET = """
import sys

import torch

import pointewa.ewa as ewa

for name in ("h5py", "omegaconf", "timm", "torchvision", "pytorch3d", "datasets", "tools"):
    assert name not in sys.modules, name
loaded = {name for name in sys.modules if name.startswith("pointewa")}
assert all(name == "pointewa" or (name + ".").startswith("pointewa.ewa.") for name in loaded), loaded

torch.manual_seed(0)
layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
vit, total_steps = torch.nn.TransformerEncoder(layer, 4), 5

model = ewa.to_moe(vit, num_experts=4, layers="every_other")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
averaging = ewa.ExpertAveraging(model, ewa.linear(0.3, total_steps)).attach(optimizer)
for _ in range(total_steps):
    optimizer.zero_grad()
    model(torch.randn(2, 9, 16)).square().mean().backward()
    optimizer.step()
dense = ewa.fold(model)

assert averaging.steps == total_steps
assert type(dense) is type(vit) and list(dense.state_dict()) == list(vit.state_dict())
x = torch.randn(2, 9, 16)
torch.testing.assert_close(dense.eval()(x), model.eval()(x), rtol=0, atol=1e-5)
files = [getattr(module, "__file__", None) for module in sys.modules.values()]
print(*filter(None, files), sep="\\n")
"""


def test_the_documented_snippet_runs_anywhere_and_loads_nothing_else_of_the_repository(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", SNIPPET], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    repository = Path(__file__).parents[2]
    files = {Path(line) for line in result.stdout.splitlines()}
    ours = {
        path.relative_to(repository).as_posix()
        for path in files
        if path.is_relative_to(repository) and not path.is_relative_to(sys.prefix)
    }
    assert "pointewa/ewa/convert.py" in ours
    assert {path for path in ours if not path.startswith("pointewa/ewa/")} <= {"pointewa/__init__.py"}
