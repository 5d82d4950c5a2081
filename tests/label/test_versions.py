"""Names, numbers and versions, without a server."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from medseg.bundles.integrity import write_manifest
from medseg.bundles.load import load_bundle
from medseg.errors import InputError, UsageError
from medseg.label.catalogue import PARENT, Catalogue
from medseg.label.parameters import InferParameters, TrainParameters, checked_name
from medseg.label.versions import Submitted, fine_tune, read_names
from tests.builders import blob_scan, save_scan, tiny_bundle, tiny_spec


def descendant(bundle: Path, folder: Path, name: str, parent: str) -> None:
    shutil.copytree(bundle, folder / name)
    path = folder / name / "configs" / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata["medseg"][PARENT] = {"name": parent}
    path.write_text(json.dumps(metadata))
    write_manifest(folder / name)


def test_versions_that_appear_are_served_and_the_newest_counts(tmp_path: Path) -> None:
    bundle, trained = tiny_bundle(tmp_path), tmp_path / "trained"
    catalogue = Catalogue([bundle], trained)
    assert (list(catalogue.served), catalogue.next_name("tiny")) == (["tiny"], "tiny_v2")
    for number in (2, 9, 10):
        descendant(bundle, trained, f"tiny_v{number}", "tiny" if number == 2 else "tiny_v2")
    descendant(bundle, trained, "other_v2", "other")
    (trained / "broken_v3" / "configs").mkdir(parents=True)
    assert [one.name for one in catalogue.refresh()] == ["tiny_v2", "tiny_v9", "tiny_v10"]
    assert catalogue.refresh() == []
    assert (catalogue.newest("tiny").name, catalogue.next_name("tiny_v2")) == ("tiny_v10", "tiny_v11")


def test_labels_that_the_bundle_does_not_have_are_not_learnt_and_nothing_is_left(tmp_path: Path) -> None:
    bundle, folder = load_bundle(tiny_bundle(tmp_path)), tmp_path / "trained"
    image = save_scan(tmp_path / "image.nii.gz", blob_scan())
    label = save_scan(tmp_path / "label.nii.gz", np.eye(34, 52, dtype=np.uint8)[..., None].repeat(35, axis=2))
    leftover = folder / ".training-999999999-x"
    leftover.mkdir(parents=True)
    for cases, why in (
        ([], "none was submitted"),
        ([Submitted(image, label, {1: "Liver"})], "1 do not fit (a label that the bundle does not have)"),
        ([Submitted(image, image, {})], "1 do not fit (not a label map: values that are not whole numbers)"),
    ):
        with pytest.raises(InputError) as refused:
            fine_tune(bundle, cases, folder, "tiny_v2", TrainParameters())
        assert why in refused.value.problem
        assert list(folder.iterdir()) == []


def test_what_a_viewer_says_of_its_labels_is_read_with_care() -> None:
    assert read_names([{"name": "Liver", "idx": 2}, {"idx": 3}, "x", {"name": 7, "idx": "4"}]) == {2: "Liver", 4: "7"}
    assert read_names({"name": "Liver"}) == read_names(None) == {}


@pytest.mark.parametrize("name", ["", "..", "a..b", "a/b", "a\\b", "a b", "a\n", "ä", "x" * 65, "%2e%2e"])
def test_names_that_could_leave_a_folder_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        checked_name("tag", name)


def test_numbers_stay_within_their_bounds() -> None:
    spec = tiny_spec(mirror_axes=())
    asked = {"overlap": -3, "tta": True, "device": ["cuda:77"], "result_dtype": "int8", "result_extension": [".nrrd"]}
    assert InferParameters.read(asked, spec) == InferParameters(overlap=0.0, suffix=".nrrd")
    assert InferParameters.read({"overlap": str(spec.overlap)}, spec) == InferParameters()
    many = {"steps": 1e12, "max_minutes": 0, "learning_rate": math.inf, "batch_size": "99"}
    assert TrainParameters.read(many) == TrainParameters(100_000, 0.1, 1e-2, 16)
    with pytest.raises(UsageError, match="steps: is not a number"):
        TrainParameters.read({"steps": "nan"})


@pytest.mark.filterwarnings("ignore:'crypt' is deprecated:DeprecationWarning")  # passlib's import
def test_a_login_of_the_realm_is_let_in_and_any_other_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("monailabel", reason="MONAI Label is not installed: medseg label install")
    import jwt
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa
    from monailabel.endpoints.user import auth

    from medseg.label.tokens import name_algorithm

    def key() -> rsa.RSAPrivateKey:
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)

    realm, public = key(), serialization.PublicFormat.SubjectPublicKeyInfo
    pem = realm.public_key().public_bytes(serialization.Encoding.PEM, public).decode()
    monkeypatch.setattr(auth, "get_public_key", lambda _uri: pem)
    monkeypatch.setattr(auth.settings, "MONAI_LABEL_AUTH_ENABLE", True)
    monkeypatch.setattr(auth, "jwt", auth.jwt)
    name_algorithm()
    claims = {"preferred_username": "reader", "email": "", "name": "", "realm_access": {"roles": ["monailabel-user"]}}
    assert auth.from_token(jwt.encode(claims, realm, "RS256")).roles == ["monailabel-user"]
    forged = jwt.encode(claims, key(), "RS256")
    for token in (forged, jwt.encode(claims, None, "none"), jwt.encode({**claims, "exp": 1}, realm, "RS256"), ""):
        with pytest.raises(jwt.InvalidTokenError):
            auth.from_token(token)
