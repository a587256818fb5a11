"""Root keys: what they show, and what an export accepts."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from equivariant.keys import Argon2Cost, RootKey, export_key, import_key, key_check, require_key
from protocol.errors import InputError

ROOT = RootKey.from_bytes(bytes(range(32)))
DEPLOYMENT = bytes(range(100, 116))
CHEAP = Argon2Cost(operations=1, memory_kib=64)
PASSPHRASE = "correct horse"


def counting() -> Callable[[int], bytes]:
    calls = 0

    def entropy(size: int) -> bytes:
        nonlocal calls
        calls += 1
        return bytes([calls]) * size

    return entropy


def test_generate_takes_all_of_the_key_from_entropy() -> None:
    assert RootKey.generate(lambda size: bytes(range(size))) == ROOT


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(InputError, match="32 bytes"):
        RootKey.from_bytes(bytes(size))


def test_text_forms_show_the_fingerprint_and_never_the_key() -> None:
    secret = ROOT.to_bytes()
    for text in (repr(ROOT), str(ROOT), f"{ROOT}", f"{[ROOT]}"):
        assert ROOT.fingerprint() in text
        assert secret.hex() not in text
        assert repr(secret) not in text


def test_fingerprints_are_stable_and_differ() -> None:
    assert ROOT.fingerprint() == "8e03-1dd3-390e-a161"
    assert RootKey.from_bytes(bytes(32)).fingerprint() != ROOT.fingerprint()


def test_key_check_separates_keys_and_deployments() -> None:
    stored = key_check(ROOT, DEPLOYMENT)
    assert len(stored) == 16
    require_key(ROOT, DEPLOYMENT, stored)
    with pytest.raises(InputError, match="wrong key"):
        require_key(RootKey.from_bytes(bytes(32)), DEPLOYMENT, stored)
    with pytest.raises(InputError, match="wrong key"):
        require_key(ROOT, bytes(16), stored)
    with pytest.raises(InputError, match="wrong key"):
        require_key(ROOT, DEPLOYMENT, b"")


def test_the_wrong_key_message_holds_no_key_material() -> None:
    with pytest.raises(InputError) as caught:
        require_key(ROOT, DEPLOYMENT, bytes(16))
    assert ROOT.to_bytes().hex() not in str(caught.value)
    assert key_check(ROOT, DEPLOYMENT).hex() not in str(caught.value)


def test_export_and_import_are_inverse() -> None:
    blob = export_key(ROOT, PASSPHRASE, counting(), CHEAP)
    assert import_key(blob, PASSPHRASE) == ROOT
    assert ROOT.to_bytes() not in blob


def test_equal_passphrases_in_different_unicode_forms_open_the_same_export() -> None:
    blob = export_key(ROOT, "caf\u00e9", counting(), CHEAP)
    assert import_key(blob, "cafe\u0301") == ROOT


def test_a_wrong_passphrase_says_so() -> None:
    blob = export_key(ROOT, PASSPHRASE, counting(), CHEAP)
    with pytest.raises(InputError, match="wrong passphrase"):
        import_key(blob, "correct hors")


def test_an_empty_passphrase_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        export_key(ROOT, "", counting(), CHEAP)


def test_any_changed_byte_is_noticed() -> None:
    blob = export_key(ROOT, PASSPHRASE, counting(), CHEAP)
    for place in range(len(blob)):
        changed = bytearray(blob)
        changed[place] ^= 1
        with pytest.raises(InputError):
            import_key(bytes(changed), PASSPHRASE)


@pytest.mark.parametrize("size", [0, 1, 37, -1])
def test_truncated_or_extended_exports_are_refused(size: int) -> None:
    blob = export_key(ROOT, PASSPHRASE, counting(), CHEAP)
    with pytest.raises(InputError, match="not a sotto key export"):
        import_key(blob[:size], PASSPHRASE)
    with pytest.raises(InputError, match="not a sotto key export"):
        import_key(blob + b"\0", PASSPHRASE)


@pytest.mark.parametrize(("operations", "memory"), [(17, 64), (0, 64), (1, 2**32 - 1), (1, 7), (2**32 - 1, 64)])
def test_a_hostile_export_cannot_ask_for_unbounded_work(operations: int, memory: int) -> None:
    blob = bytearray(export_key(ROOT, PASSPHRASE, counting(), CHEAP))
    blob[10:18] = struct.pack("<II", operations, memory)
    with pytest.raises(InputError, match="Argon2id"):
        import_key(bytes(blob), PASSPHRASE)
