"""Checks who depends on whom: proto -> core -> libraries -> services, services never on each other,
and neither the orchestrator nor the command line on libtorch. Exits 1 with every breach named."""

import json
import subprocess
import sys

LIBRARIES = {
    "retort-artifact", "retort-bus", "retort-export", "retort-import", "retort-kernels", "retort-llama", "retort-model", "retort-plan",
    "retort-process", "retort-worker",
}
SERVICES = {"retort-broker", "retort-orchestrator", "retort-teacher", "retort-student", "retort-cli"}
# Everything of ours that a package may use directly, outside its tests.
ALLOWED = {
    "retort-proto": set(),
    "retort-core": {"retort-proto"},
    "retort-process": {"retort-core"},
    "retort-artifact": {"retort-core"},
    "retort-bus": {"retort-core", "retort-proto"},
    "retort-model": {"retort-core"},
    "retort-import": {"retort-core", "retort-model"},
    "retort-export": {"retort-core", "retort-import", "retort-model"},
    "retort-kernels": set(),
    "retort-llama": {"retort-core", "retort-kernels", "retort-model"},
    "retort-plan": {"retort-core", "retort-model"},
    "retort-worker": {"retort-proto", "retort-core", "retort-process", "retort-artifact", "retort-bus"},
    "retort-broker": {"retort-core", "retort-process"},
    "retort-orchestrator": {
        "retort-proto", "retort-core", "retort-process", "retort-artifact", "retort-bus", "retort-export", "retort-model",
        "retort-plan",
    },
    "retort-teacher": {"retort-proto", "retort-core", "retort-process", "retort-artifact", "retort-worker", "retort-kernels", "retort-llama", "retort-model"},
    "retort-student": {"retort-proto", "retort-core", "retort-process", "retort-artifact", "retort-worker", "retort-export", "retort-kernels", "retort-llama"},
    "retort-cli": {
        "retort-proto", "retort-core", "retort-process", "retort-artifact", "retort-export", "retort-import", "retort-model",
        "retort-plan",
    },
    "retort-tests": LIBRARIES | {"retort-proto", "retort-core"},
}
WITHOUT_LIBTORCH = ["retort-orchestrator", "retort-cli", "retort-broker", "retort-export", "retort-import", "retort-kernels", "retort-model", "retort-plan"]

metadata = json.loads(subprocess.check_output(["cargo", "metadata", "--format-version=1", "--no-deps", "--locked"]))
breaches = []
for package in metadata["packages"]:
    name = package["name"]
    if name not in ALLOWED:
        breaches.append(f"{name} has no place in setup/layers.py: say what it may depend on")
        continue
    for dependency in package["dependencies"]:
        ours = dependency["name"].startswith("retort-")
        if ours and dependency["kind"] is None and dependency["name"] not in ALLOWED[name]:
            breaches.append(f"{name} must not depend on {dependency['name']}")
        if dependency["kind"] is None and dependency["name"] in SERVICES:
            breaches.append(f"{name} depends on the service {dependency['name']}")
for name in WITHOUT_LIBTORCH:
    tree = subprocess.check_output(["cargo", "tree", "--locked", "-p", name, "-e", "normal", "--prefix", "none"], text=True)
    if any(line.split()[0] == "torch-sys" for line in tree.splitlines() if line):
        breaches.append(f"{name} links libtorch")
for breach in breaches:
    print(f"layers: {breach}", file=sys.stderr)
if breaches:
    sys.exit(1)
print(f"layers: {len(metadata['packages'])} packages keep to their layers; {', '.join(WITHOUT_LIBTORCH)} link no libtorch")
