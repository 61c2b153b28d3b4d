"""Read a tuning report from JSON, and use its plan in the next run without a search."""

from __future__ import annotations

import tempfile
from pathlib import Path

import autobatch
from autobatch import sinks
from autobatch.testing import PaperDevice

# A device by formula: 1 GiB; a step needs 256 MiB and 2 MiB per sample.
device = PaperDevice("1GiB", fixed=2**28, per_sample=2**21)
report = autobatch.find(device.workload, device=device, target_batch_size=1024, dataset_size=50_000)

path = Path(tempfile.mkdtemp()) / "autobatch.json"
sinks.json_file(path)(report)

report = autobatch.TuningReport.from_json(path.read_text(encoding="utf-8"))
print(report)
print(f"largest that fits: {report.largest_fit}, budget: {report.budget:,} bytes")
for trial in report.trials:
    print(f"{trial.batch_size:>5}  {trial.outcome:<14}{trial.peak or 0:>14,} bytes")

again = autobatch.find(device.workload, device=device, plan=path)  # one trial, no search
assert again.plan == report.plan
assert len(again.trials) == 1
