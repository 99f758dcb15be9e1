"""Keys and certificates of a consortium: elliptic curve P-384 throughout.

Only their owner can read the private keys.
"""

import ipaddress
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmide.atomic import write_file

_CA_DAYS, _SERVER_DAYS = 3650, 825
"""Days for which the certificates of the authority and of the server are valid."""


_CLOCKS_DIFFER = timedelta(hours=1)
"""Certificates are valid from this long ago, so that a site whose clock is behind accepts them."""


@dataclass(frozen=True)
class Authority:
    """The signer of the server's certificate.

    The key never leaves the coordinator. The certificate is the one that sites trust.
    """

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def write_secret(path: Path, data: bytes) -> None:
    """Writes a file that only its owner can read, even while it is being written."""
    former = os.umask(0o077)
    try:
        write_file(path, data)
    finally:
        os.umask(former)


def new_authority(name: str) -> Authority:
    """A new certificate authority."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _name(f"{name} certificate authority")
    # only key_cert_sign and crl_sign: the authority's key signs certificates and lists of revoked ones
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    builder = (
        _builder(subject, subject, key.public_key(), _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return Authority(key, builder.sign(key, hashes.SHA384()))


def server_certificate(authority: Authority, hosts: Sequence[str]) -> tuple[bytes, bytes]:
    """A new key and its certificate, both as PEM, for a server with these names and addresses."""
    key = ec.generate_private_key(ec.SECP384R1())
    names = x509.SubjectAlternativeName([_host(host) for host in dict.fromkeys(hosts)])
    issuer = authority.certificate.subject
    builder = (
        _builder(_name(hosts[0]), issuer, key.public_key(), _SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(names, critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
    )
    certificate = builder.sign(authority.key, hashes.SHA384())
    return private_pem(key), certificate.public_bytes(Encoding.PEM)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as PEM."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def node_key() -> tuple[bytes, bytes]:
    """A new private and public key for a node, in OpenSSH's formats."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return private, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"


def new_secret() -> bytes:
    """A secret that a node or a SuperLink shares with its executor: 256 bits as hexadecimal digits."""
    return secrets.token_hex(32).encode()


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    begin = datetime.now(UTC) - _CLOCKS_DIFFER
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=days))
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
