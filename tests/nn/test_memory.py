"""Peak memory of compressing a model, measured in processes of their own."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import resource, torch, bitforbit
from torch import nn

def rss():  # bytes now
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

bitforbit.compress_model(nn.Linear(256, 256).bfloat16())  # imports and first buffers do not count
before = rss()
model = nn.Sequential(*(nn.Linear(1024, 4096, bias=False, dtype=torch.bfloat16) for _ in range(24)))
plain = rss() - before
open("/proc/self/clear_refs", "w").write("5")  # resets the high-water mark
if {compress}:
    bitforbit.compress_model(model)
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")) - before
after = rss() - before
with torch.no_grad():
    for linear in model:
        linear(torch.zeros(1, 1024, dtype=torch.bfloat16))
print(plain, peak, after, rss() - before)
"""


def measure(compress: bool) -> list[int]:
    run = subprocess.run([sys.executable, "-c", SCRIPT.format(compress=compress)], capture_output=True, check=True)
    return [int(n) for n in run.stdout.split()]


def test_peak_of_compress_model():
    plain, peak, after, in_use = measure(True)
    matrix = 1024 * 4096 * 2
    assert plain > 23 * matrix
    assert peak < plain + 3 * matrix  # parameter by parameter: never a second model
    assert after < 0.72 * plain
    assert in_use < after + 4 * matrix  # a decoded weight at a time, or a probe of the product
