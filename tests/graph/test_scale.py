"""What a partition of a large backbone costs."""

import json
import subprocess
import sys

import pytest

MEASURE = """
import json, resource, sys, time
import timm, torch, torch._dynamo, torch.export, torchvision, rich.console
import dvn_cli.backbones.weights, dvn_cli.cli.partition, dvn_cli.network, dvn_cli.units.count
from dvn_cli.cli import main

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

before, start = peak(), time.perf_counter()
sys.argv = ["dvn", "partition", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps({"bytes": peak() - before, "seconds": time.perf_counter() - start}), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_large_patch16_224", "convnext_large"])
def test_partition_of_a_large_model(name, tmp_path):
    """Beyond what the imports take, 1.5 times the file's size; and a minute."""
    file = tmp_path / "dvn.safetensors"
    command = [sys.executable, "-c", MEASURE, name, "--units", "4", "-o", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    cost = json.loads(done.stderr.splitlines()[-1])
    print(name, cost, cost["bytes"] / file.stat().st_size)
    assert cost["bytes"] < 1.5 * file.stat().st_size
    assert cost["seconds"] < 60
