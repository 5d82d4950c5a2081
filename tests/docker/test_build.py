"""The CPU images, built from the Dockerfile as it stands and run as docs/containers.md runs them.

Without Docker: podman builds and runs them, on a base that mmdebstrap makes. Packages come from a folder that the
machine's own pip fills, so that whatever way that pip takes to its index is of no concern to the images, and so that
a package that the locks forget is not there.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from packaging.utils import canonicalize_name

from medseg.label.install import PACKAGE
from tests.docker.container_files import DOCKER, ROOT, arguments, instructions, locked

SERVED = ("review", "label")
TARGETS = ("medseg", *SERVED)
TOOLS = ("mmdebstrap", "podman", "runc")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]
SAMPLE = ROOT / "data" / "samples" / "hippocampus_003.nii.gz"
USER = 10001
ROOMY, ROOM = "/var/tmp", 25 * 10**9  # noqa: S108 - 20 GB at most while it builds, which /tmp may not have
LIMIT = 1200  # seconds for what takes one minute on an idle machine


def _may_mount() -> bool:
    """Whether this root may mount, which one in a container usually may not."""
    unshare = shutil.which("unshare")
    return unshare is not None and subprocess.run([unshare, "--mount", "true"], check=False).returncode == 0


pytestmark = [
    pytest.mark.images,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="images are built by root only (sudo, or in CI)"),
    pytest.mark.skipif(
        bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (Debian packages; .ci/run has them)"
    ),
    pytest.mark.skipif(
        shutil.disk_usage(ROOMY).free < ROOM, reason=f"less than {ROOM // 10**9} GB free in {ROOMY} for building images"
    ),
    pytest.mark.skipif(not _may_mount(), reason="no right to mount file systems, which building images needs"),
]


@dataclass(frozen=True)
class Podman:
    """podman with a store of its own in a folder."""

    folder: Path

    def __call__(self, *words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        store = ["--root", self.folder / "store", "--runroot", self.folder / "run", "--storage-driver", "overlay"]
        command = ["podman", *store, "--runtime", "runc", "--cgroup-manager", "cgroupfs", *words]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not check or run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
        return run

    def start(self, folder: Path, *words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """``podman run`` as the image's user; no network, and nothing but ``folder`` and /tmp can be written to."""
        shutil.chown(folder, USER, USER)
        closed = ["--read-only", "--tmpfs", "/tmp", "--network", "none", "--cap-drop", "ALL"]  # noqa: S108
        closed += ["--security-opt", "no-new-privileges", "--volume", f"{folder}:/data"]
        for limit in ("nofile", "nproc"):  # podman's own are higher than what a root without all capabilities may set
            closed += ["--ulimit", f"{limit}=4096:4096"]
        return self("run", *closed, *words, check=check)

    def healthy(self, name: str) -> bool:
        """The health check that stands in the image, once."""
        return self("healthcheck", "run", name, check=False).returncode == 0


def base(folder: Path) -> Path:
    """Debian 12 as an archive, in place of the pinned image; its pip knows a folder of wheels and no index."""
    pip = folder / "pip.conf"
    pip.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    told = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=True).stdout  # noqa: S607
    apt = folder / "apt.conf"  # how this machine gets through to its mirror
    apt.write_text("\n".join(re.findall(r'^Acquire::(?:https?::|Check-).*"(?:.+)";$', told, re.MULTILINE)) + "\n")
    sources = [
        path for path in Path("/etc/apt/sources.list.d").glob("debian.sources") if "bookworm" in path.read_text()
    ]
    archive = folder / "base.tar"
    options = ["--variant=minbase", "--dpkgopt=force-unsafe-io", f"--aptopt={apt}"]
    hook = f"--customize-hook=upload {shlex.quote(str(pip))} /etc/pip.conf"
    run = subprocess.run(
        ["mmdebstrap", *options, hook, "bookworm", archive, *sources],  # noqa: S607
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return archive


def wheels(folder: Path) -> Path:
    """A folder of what the Dockerfile and the locks name, and of what builds medseg; nothing that these only need."""
    found = folder / "wheels"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", found]
    locks = [
        word for name in ("requirements.txt", "requirements-label.txt") for word in ("--requirement", DOCKER / name)
    ]
    given = arguments()
    # Where the ordinary index has a build with CUDA, the one without comes from the index that the Dockerfile names.
    index = [] if torch.version.cuda is None else ["--index-url", given["TORCH_CPU_INDEX"]]
    pinned = ["--no-deps", "--python-version", "3.11"]
    backend = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    for words in (
        [*pinned, *index, f"torch=={given['TORCH']}"],
        [*pinned, f"pip=={given['PIP']}", PACKAGE, *locks],
        [*backend, "setuptools", "wheel"],
    ):
        subprocess.run([*pip, *words], check=True, stdout=subprocess.DEVNULL)
    return found


def build(podman: Podman, archive: Path, packages: Path) -> str:
    """Builds every target and returns what was printed."""
    podman("import", archive, "localhost/base:bookworm")
    said = ""
    for target in TARGETS:
        words = ["--file", DOCKER / "Dockerfile", "--target", target, "--tag", f"localhost/{target}:cpu"]
        words += ["--build-arg", "BASE=localhost/base:bookworm", "--volume", f"{packages}:/wheels:ro"]
        run = podman(
            "build", "--pull=never", "--format", "docker", "--isolation", "chroot", "--network", "host", *words, ROOT
        )
        said += run.stdout + run.stderr
    return said


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    folder = Path(tempfile.mkdtemp(prefix="medseg-images-", dir=ROOMY))
    podman = Podman(folder)
    try:
        yield podman
    finally:
        podman("rm", "--all", "--force", check=False)
        subprocess.run(["umount", "--recursive", folder / "store" / "overlay"], capture_output=True, check=False)  # noqa: S607
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def built(podman: Podman) -> str:
    """What building all targets printed."""
    return build(podman, base(podman.folder), wheels(podman.folder))


def test_every_run_step_of_the_dockerfile_has_run(built: str) -> None:
    said = " ".join(built.split())
    steps = [rest for word, rest in instructions() if word == "RUN"]
    assert len(steps) >= 6
    assert [step for step in steps if " ".join(f"RUN {step}".split()) not in said] == []


def test_the_images_hold_the_locks_versions_and_nothing_else(podman: Podman, built: str, tmp_path: Path) -> None:
    script = "import importlib.metadata as m, json; print(json.dumps([[d.name, d.version] for d in m.distributions()]))"
    given = arguments()
    wanted = locked("requirements.txt") | {"torch": given["TORCH"], "medseg": given["VERSION"]}
    name, version = PACKAGE.split("==")
    more = locked("requirements-label.txt") | {name: version}
    for target in TARGETS:
        image = ("--rm", "--entrypoint", "python", f"localhost/{target}:cpu")
        held = json.loads(podman.start(tmp_path, *image, "-c", script).stdout)
        found = {canonicalize_name(name): version.partition("+")[0] for name, version in held}
        assert found == (wanted | more if target == "label" else wanted), target


def test_the_command_line_segments_the_sample_as_the_images_user(podman: Podman, built: str, tmp_path: Path) -> None:
    image = ("--rm", "localhost/medseg:cpu")
    assert " infer " in podman.start(tmp_path, *image).stdout
    shutil.copy(SAMPLE, tmp_path)
    podman.start(tmp_path, *image, "infer", SAMPLE.name)
    name = SAMPLE.name.removesuffix(".nii.gz")
    made = {path.name: path.stat().st_uid for path in tmp_path.iterdir() if path.name != SAMPLE.name}
    assert made == {f"{name}_seg{suffix}": USER for suffix in (".nii.gz", ".json", ".png")}
    labels = np.asarray(nib.load(tmp_path / f"{name}_seg.nii.gz").dataobj)
    truth = np.asarray(nib.load(SAMPLE.with_name(f"{name}_label.nii.gz")).dataobj)
    for label in (1, 2):
        found, true = labels == label, truth == label
        assert 2 * (found & true).sum() > 0.8 * (found.sum() + true.sum()), label
    run = podman.start(tmp_path, *image, "infer", "missing.nii.gz", check=False)
    assert run.returncode == 3
    assert run.stderr.endswith("error: missing.nii.gz: no such file; check the path\n")  # after a word of podman's own


@pytest.mark.parametrize(
    ("command", "path", "answer"),
    [
        (["review", "--data", "/data", "--host", "127.0.0.1"], ":8501/", "<title>Streamlit</title>"),
        (["label", "serve", "--studies", "/data", "--host", "127.0.0.1"], ":8000/info/", "swin_unetr_hippocampus"),
    ],
    ids=SERVED,
)
def test_a_server_becomes_well_by_the_images_own_check_and_stops_when_told(
    command: list[str], path: str, answer: str, podman: Podman, built: str, tmp_path: Path
) -> None:
    name = command[0]
    shutil.copy(SAMPLE, tmp_path)
    models = tmp_path / "models"
    models.mkdir()
    shutil.chown(models, USER, USER)
    kept = ("--volume", f"{models}:/var/lib/medseg")
    podman.start(tmp_path, "--detach", "--name", name, *kept, f"localhost/{name}:cpu", *command)
    end = time.monotonic() + LIMIT
    while not podman.healthy(name):
        state = podman("inspect", "--format", "{{.State.Status}}", name).stdout.strip()
        assert (state, time.monotonic() < end) == ("running", True), podman("logs", name).stderr
        time.sleep(1)
    ask = f"import urllib.request as u; print(u.urlopen('http://127.0.0.1{path}').read().decode())"
    assert answer in podman("exec", name, "python", "-c", ask).stdout
    podman("stop", "--time", "60", name)
    assert podman("inspect", "--format", "{{.State.ExitCode}}", name).stdout == "0\n", podman("logs", name).stderr


@pytest.mark.parametrize(
    ("target", "code", "said"),
    [("review", 3, "/run/secrets/review_login"), ("label", 2, "others can reach 0.0.0.0")],
    ids=SERVED,
)
def test_an_image_that_is_started_without_a_login_serves_nobody(
    target: str, code: int, said: str, podman: Podman, built: str, tmp_path: Path
) -> None:
    run = podman.start(tmp_path, "--rm", f"localhost/{target}:cpu", check=False)
    assert run.returncode == code, run.stderr
    assert said in run.stderr
