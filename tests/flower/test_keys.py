"""Keys and certificates: P-384, for the hosts they name, signed by the authority, readable by their owner."""

import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key, load_ssh_public_key

from fedmide.flower import keys


def test_a_server_certificate_is_its_authority_s_and_names_its_hosts() -> None:
    authority, other = keys.new_authority("one"), keys.new_authority("two")
    pem, certificate_pem = keys.server_certificate(authority, ["example.org", "127.0.0.1", "::1", "example.org"])
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    certificate.verify_directly_issued_by(authority.certificate)
    with pytest.raises((InvalidSignature, ValueError)):
        certificate.verify_directly_issued_by(other.certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["example.org"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    key = load_pem_private_key(pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp384r1"
    assert key.public_key() == certificate.public_key()
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_node_key_is_p384_in_openssh_s_form() -> None:
    private, public = keys.node_key()
    key = load_ssh_private_key(private, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp384r1"
    assert load_ssh_public_key(public) == key.public_key()
    assert public.startswith(b"ecdsa-sha2-nistp384 ")
    assert keys.node_key()[1] != public


def test_a_secret_is_its_owner_s_only(tmp_path: Path) -> None:
    keys.write_secret(tmp_path / "keys" / "s", keys.new_secret())
    assert stat.S_IMODE((tmp_path / "keys" / "s").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    assert len((tmp_path / "keys" / "s").read_bytes()) == 64
    assert keys.new_secret() != keys.new_secret()
