"""The container files: what they promise of pins, users, secrets and addresses, and their scripts, run."""

from __future__ import annotations

import http.server
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import medseg
from medseg.label.install import PACKAGE
from tests.docker.container_files import DOCKER, PROJECT, ROOT, arguments, instructions, last, locked, stages

OVERLAYS = ("compose.network.yaml", "compose.cuda.yaml")
SERVED = ("review", "label")


class Compose(yaml.SafeLoader):
    """Reads Compose's own tag, which takes away what an earlier file said."""


Compose.add_constructor("!reset", lambda _loader, _node: None)


def services(name: str = "compose.yaml") -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.load((DOCKER / name).read_text(), Loader=Compose)["services"]  # noqa: S506
    return found


def test_every_base_is_pinned_by_digest_and_only_stages_and_that_base_are_built_on() -> None:
    assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", arguments()["BASE"])
    bases = [rest.partition(" AS ")[0] for word, rest in instructions() if word == "FROM"]
    assert set(bases) <= {"${BASE}", *stages()}
    label = next(rest for word, rest in stages()["medseg"] if word == "LABEL")
    assert shlex.split(label)[-2] == f"org.opencontainers.image.base.name={arguments()['BASE'].partition('@')[0]}"


@pytest.mark.parametrize("stage", ["medseg", *SERVED])
def test_an_image_runs_as_a_numbered_user_through_an_init_and_says_whether_it_is_well(stage: str) -> None:
    assert last(stage, "USER") == "10001:10001"
    assert last(stage, "ENTRYPOINT").startswith('["tini"')
    assert (last(stage, "HEALTHCHECK") == "NONE") == (stage == "medseg")
    names = " ".join(rest for word, rest in stages()[stage] if word in ("ENV", "ARG"))
    assert not re.search(r"(?i)(passw|secret|token|_key)", names), "a secret in an image is everybody's"
    assert not [word for word, _ in stages()[stage] if word == "ADD"]


def test_what_is_copied_is_in_the_build_context_and_nothing_private_is() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]

    def sent(path: str) -> bool:
        answer = True
        for rule in rules:
            pattern = rule.removeprefix("!").replace("**/", "*")
            parts = [path, *(str(parent) for parent in Path(path).parents)]
            if any(fnmatch(part, pattern) for part in parts if part != "."):
                answer = rule.startswith("!")
        return answer

    copied = [
        source
        for word, rest in instructions()
        if word == "COPY" and "--from" not in rest
        for source in [part for part in rest.split() if not part.startswith("--")][:-1]
    ]
    mounted = re.findall(r"--mount=type=bind,source=([^,]+)", (DOCKER / "Dockerfile").read_text())
    assert len(copied) >= 8
    assert mounted
    for source in [*copied, *mounted]:
        assert (ROOT / source).exists(), source
        assert sent(source), source
    for private in (".git/config", ".venv/bin/python", "data/x.nii.gz", "docker/secrets/review_key", "app/frontend/a"):
        assert not sent(private), private


def test_the_lock_holds_every_dependency_at_a_version_that_pyproject_allows() -> None:
    base, more = locked("requirements.txt"), locked("requirements-label.txt")
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(one for name in ("auth", "app", "fast", "train") for one in extras[name])]
    torch = re.search(r"^TORCH \?= torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch is not None
    assert arguments()["TORCH"] == torch[1], "the images hold the torch that the tests ran with"
    for text, held in [*((one, base) for one in wanted), *((one, base | more) for one in extras["label"])]:
        requirement = Requirement(text)
        if (name := canonicalize_name(requirement.name)) == "medseg":
            continue
        version = arguments()["TORCH"] if name == "torch" else held.get(name)
        assert version is not None, f"{name} is not locked; run the command in docker/requirements.txt"
        assert requirement.specifier.contains(version), f"{name} {version} against {requirement}"
    assert arguments()["VERSION"] == medseg.__version__
    assert PACKAGE.startswith("monailabel==")
    assert not set(base) & set(more)


def test_services_can_write_nowhere_but_their_volumes_and_are_reached_from_this_machine_only() -> None:
    for name, service in services().items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert {"mem_limit", "cpus", "pids_limit"} <= set(service), name
        assert not str(service["user"]).startswith("0"), name
        if service.get("network_mode") == "host":
            assert "--host=127.0.0.1" in service["command"], name
        if "build" not in service:
            assert re.search(r":[\w.-]+@sha256:[0-9a-f]{64}$", service["image"]), name
            assert service["healthcheck"]["test"], name
        else:
            assert service["build"]["target"] in SERVED, name
            assert "HEALTHCHECK" in {word for word, _ in stages()[service["build"]["target"]]}, name
    for name in ("compose.yaml", *OVERLAYS):
        for service in services(name).values():
            assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports") or [])
            for key, value in (service.get("environment") or {}).items():
                if re.search("PASSWORD|KEY|SECRET|TOKEN", key):
                    assert key.endswith("_FILE"), key
                    assert value.startswith("/run/secrets/"), key
    network = services("compose.network.yaml")
    assert any(word.startswith("--login=/run/secrets/") for word in network["review"]["command"])
    assert network["label"]["environment"]["MONAI_LABEL_AUTH_ENABLE"] == "true"


@pytest.mark.parametrize("overlays", [[], [OVERLAYS[0]], [OVERLAYS[1]], list(OVERLAYS)], ids="+".join)
def test_compose_itself_accepts_the_files(overlays: list[str], tmp_path: Path) -> None:
    compose = Path(sys.executable).with_name("docker-compose")
    if not compose.is_file():
        pytest.skip("docker-compose is not installed (it comes with the extra dev on Linux, x86-64)")
    files = [word for name in ["compose.yaml", *overlays] for word in ("-f", DOCKER / name)]
    environment = {"MEDSEG_FOLDER": str(tmp_path), "MONAI_LABEL_AUTH_REALM_URI": "https://example.org", "HOME": "/"}
    run = subprocess.run([compose, *files, "config"], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    read = yaml.safe_load(run.stdout)
    assert set(read["services"]) == {"review", "label", "database"}
    shared = [name for name, service in read["services"].items() if service.get("network_mode") == "host"]
    assert shared == ([] if OVERLAYS[0] in overlays else ["label", "review"])
    without = {name: value for name, value in environment.items() if name != "MEDSEG_FOLDER"}
    run = subprocess.run([compose, *files, "config"], env=without, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "MEDSEG_FOLDER" in run.stderr


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.is_file():
        pytest.skip("hadolint is not installed (it comes with the extra dev on Linux, x86-64)")
    run = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "")


def test_every_run_step_is_a_shell_script_that_parses() -> None:
    steps = [re.sub(r"--mount=\S+\s*", "", rest) for word, rest in instructions() if word == "RUN"]
    assert len(steps) >= 6
    for step in steps:
        run = subprocess.run(["/bin/sh", "-n", "-c", step], capture_output=True, text=True, check=False)
        assert run.returncode == 0, (step, run.stderr)


@pytest.mark.parametrize(("device", "calls"), [("cpu", 1), ("cuda", 0), ("gpu", None)])
def test_the_step_that_chooses_torch_takes_the_cpu_build_from_its_index(
    device: str, calls: int | None, tmp_path: Path
) -> None:
    step = next(rest for word, rest in instructions() if word == "RUN" and "DEVICE" in rest)
    pip = tmp_path / "pip"
    pip.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    pip.chmod(0o700)
    run = subprocess.run(
        ["/bin/sh", "-eu", "-c", step.replace("/opt/pip/bin/pip", str(pip))],
        env={**arguments(), "DEVICE": device},
        capture_output=True,
        text=True,
        check=False,
    )
    made = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    if calls is None:
        assert (run.returncode, run.stderr) == (1, "DEVICE is cpu or cuda, not gpu\n")
    else:
        assert run.returncode == 0
        index = f"--index-url {arguments()['TORCH_CPU_INDEX']} torch=={arguments()['TORCH']}"
        assert [line.endswith(index) for line in made] == [True] * calls


def test_the_entrypoint_hands_secrets_on_by_environment_and_becomes_the_program(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("it's $HOME; two  words\n")
    program = 'import os; print(os.getpid(), os.environ.get("PGPASSWORD"), os.environ.get("MEDSEG_REVIEW_KEY"))'
    with subprocess.Popen(
        ["/bin/sh", DOCKER / "entrypoint.sh", sys.executable, "-c", program],
        env={"PGPASSWORD_FILE": str(tmp_path / "password")},
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        told = run.communicate()[0]
    assert told == f"{run.pid} it's $HOME; two  words None\n"
    missing = subprocess.run(
        ["/bin/sh", DOCKER / "entrypoint.sh", "true"],
        env={"PGPASSWORD_FILE": str(tmp_path / "nothing"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        check=False,
    )
    assert missing.returncode != 0, "a server without its secret must not start"


@contextmanager
def answering(status: int) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


@pytest.mark.parametrize(("status", "well"), [(204, True), (401, True), (500, False), (404, False)])
def test_the_health_check_takes_an_answer_and_a_question_for_a_login_for_well(status: int, *, well: bool) -> None:
    with answering(status) as address:
        run = subprocess.run([sys.executable, DOCKER / "healthy.py", address], capture_output=True, check=False)
    assert (run.returncode == 0) == well
    if well:  # the server is gone now
        run = subprocess.run([sys.executable, DOCKER / "healthy.py", address], capture_output=True, check=False)
        assert run.returncode == 1
    assert run.stderr == b""
