"""The GPU stack's pins go together: pip resolves them as for a machine that has nothing, and installs nothing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.network
def test_gpu_requirements_resolve(tmp_path):
    report = tmp_path / "report.json"
    options = ["--dry-run", "--ignore-installed", "--quiet", "--report", str(report), "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "-r", "requirements.txt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {p["metadata"]["name"].lower(): p["metadata"]["version"] for p in json.loads(report.read_text())["install"]}
    pins = "".join(Path(name).read_text() for name in ("requirements.txt", "requirements-base.txt"))
    for name, version in re.findall(r"^([\w-]+)==(\S+)", pins, re.M):
        assert found[name.lower()].split("+")[0] == version
