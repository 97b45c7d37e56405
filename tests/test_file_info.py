"""Hashes of files, and sizes in bytes with a unit."""

import hashlib

import pytest

from stepfuse.data.file_info import file_hash, size_label, text_hash


@pytest.mark.parametrize(
    ("size", "label"),
    [
        (0, "–"),
        (485, "485 B"),
        (1_000, "1 kB"),
        (2_224_041, "2.2 MB"),
        (14_000_000, "14 MB"),
        (99_500_000, "100 MB"),
        (500_000_000, "500 MB"),
        (1_786_880_927, "1.8 GB"),
        (12_300_000_000, "12 GB"),
    ],
)
def test_a_size_has_a_decimal_unit_and_two_digits_or_more(size, label):
    assert size_label(size) == label


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert file_hash(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_the_hash_of_a_text_is_that_of_its_utf8() -> None:
    assert text_hash("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # FIPS 180-4, empty
    assert text_hash("é") == hashlib.sha256(b"\xc3\xa9").hexdigest()
