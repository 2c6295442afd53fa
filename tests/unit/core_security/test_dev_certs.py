"""`pdserve certs`: what it makes, and what it leaves alone."""

import ipaddress
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from pdserve.cli.app import run
from pdserve.core.config import SecurityConfig
from pdserve.core.errors import ConfigError
from pdserve.core.security.cluster_tls import FrontTls, WorkerTls
from pdserve.core.security.dev_certs import make_certificates
from pdserve.core.security.tls import WORKER_NAME


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs") / "new" / "dir"
    make_certificates(folder, ["gpu-1.example", "10.0.0.7"], days=30)
    return folder


def load(folder: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / f"{name}.pem").read_bytes())


@pytest.mark.parametrize(
    ("name", "authority"),
    [("ca", "ca"), ("server", "ca"), ("worker", "ca"), ("client-ca", "client-ca"), ("client", "client-ca")],
)
def test_each_certificate_is_p256_signed_by_its_authority_and_valid_as_long_as_asked(
    folder: Path, name: str, authority: str
) -> None:
    certificate = load(folder, name)
    certificate.verify_directly_issued_by(load(folder, authority))
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP256R1)
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=29, hours=23) < left <= timedelta(days=30)
    assert certificate.not_valid_before_utc <= datetime.now(UTC)
    signs = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert signs == (name == authority)


def test_the_server_has_the_local_names_and_those_asked_for(folder: Path) -> None:
    names = load(folder, "server").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "gpu-1.example"]
    addresses = ("127.0.0.1", "::1", "10.0.0.7")
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address(a) for a in addresses]


def test_only_workers_have_the_workers_name_and_clients_cannot_serve(folder: Path) -> None:
    worker = load(folder, "worker").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert WORKER_NAME in worker.get_values_for_type(x509.DNSName)
    usage = load(folder, "client").extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_keys_are_their_owners_alone(folder: Path) -> None:
    keys = sorted(folder.glob("*.key"))
    assert len(keys) == 5
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_nothing_is_overwritten_even_where_one_file_is_left(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        make_certificates(folder)
    (tmp_path / "worker.key").write_text("mine")
    with pytest.raises(ConfigError, match=r"worker\.key"):
        make_certificates(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["worker.key"]
    assert (tmp_path / "worker.key").read_text() == "mine"


@pytest.mark.parametrize("host", ["", "https://example.com", "example.com:8443", "a b", "-x", "ü.example"])
def test_a_host_that_is_no_name_is_refused_before_anything_is_written(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="neither a DNS name nor an IP address"):
        make_certificates(tmp_path / "new", [host])
    assert not (tmp_path / "new").exists()


def test_the_folder_is_all_that_a_cluster_needs_to_be_told(folder: Path) -> None:
    config = SecurityConfig(tls_dir=str(folder), client_certificates=True)
    front, workers = FrontTls.load(config), WorkerTls.load(config)
    assert front is not None
    assert front.server.client_ca is not None
    assert front.client.server_name == "localhost"
    assert workers is not None
    assert workers.client.server_name == WORKER_NAME
    key = (folder / "server.key").read_text().splitlines()[1]
    assert key not in repr(front)
    assert FrontTls.load(SecurityConfig()) is None


def test_the_command_says_what_it_made_and_refuses_a_second_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "certs"
    assert run(["certs", str(target), "--host", "a.example"]) == 0
    assert str(target / "ca.pem") in capsys.readouterr().out
    assert run(["certs", str(target)]) == 1
    assert "nothing is overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tls_key": "worker.key"}, "not a certificate and its own"),
        ({"tls_certificate": "server.key"}, "not a certificate and its own"),
        ({"tls_certificate": "none.pem"}, "cannot read"),
        ({"tls_ca": "server.key"}, "no valid certificate"),
    ],
)
def test_files_that_do_not_fit_are_found_before_anything_listens(
    folder: Path, change: dict[str, str], says: str
) -> None:
    paths = {name: str(folder / path) for name, path in change.items()}
    with pytest.raises(ConfigError, match=says):
        FrontTls.load(SecurityConfig(tls_dir=str(folder), **paths))


def test_a_workers_certificate_must_have_the_workers_name(folder: Path) -> None:
    server = (str(folder / "server.pem"), str(folder / "server.key"))
    config = SecurityConfig(tls_dir=str(folder), worker_certificate=server[0], worker_key=server[1])
    with pytest.raises(ConfigError, match=r"localhost, gpu-1\.example.*must have pdserve-worker"):
        WorkerTls.load(config)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tls_certificate": "a"},
        {"tls_certificate": "a", "tls_key": "b"},
        {"client_certificates": True},
        {"client_ca": "a"},
        {"worker_certificate": "a", "worker_key": "b"},
        {"tls_dir": "a", "worker_key": "b"},
    ],
)
def test_half_a_configuration_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"security\."):
        SecurityConfig(**wrong)  # type: ignore[arg-type]
